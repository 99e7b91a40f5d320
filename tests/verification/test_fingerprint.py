"""Laws of the proof that the dense model is what was loaded, in code and configuration as well as in weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nmbench.errors import ModelChanged, NMBenchError
from nmbench.experiment.plan import checked
from nmbench.experiment.setup import prepared
from nmbench.plugins.loading import load_plugins
from nmbench.spec import MethodSpec, RunSpec
from nmbench.verification.fingerprint import Fingerprint

CHANGES = {
    "weights": lambda bundle: bundle.model.lm_head.weight.data.mul_(2),  # undone
    "training": lambda bundle: bundle.model.train(),  # undone
    "code": lambda bundle: setattr(bundle.model.model.norm, "forward", lambda hidden: 2 * hidden),
    "epsilon": lambda bundle: setattr(bundle.model.model.norm, "variance_epsilon", 0.1),
    "layers": lambda bundle: bundle.layers.popitem(),
    "dtype": lambda bundle: bundle.model.double(),
    "submodule": lambda bundle: setattr(bundle.model.model.layers[0], "mlp", torch.nn.Identity()),
}
UNDONE = ("weights", "training")


@pytest.fixture
def experiment(texts):
    """An experiment with a tiny model."""
    spec = RunSpec(
        methods=(MethodSpec.parse("magnitude"),),
        model="tiny:llama",
        calibration=f"text:{texts}/cal.txt",
        metrics=(f"ppl:text:{texts}/test.txt@64",),
    )
    plugins = load_plugins()
    return prepared(checked(spec, plugins))


@pytest.mark.parametrize("what", CHANGES)
def test_every_change_is_undone_or_found(experiment, what):
    """A change that restoring does not undo is found, with the name of its method, and gone after another load."""
    assert experiment.is_intact()
    CHANGES[what](experiment.bundle)
    assert experiment.is_intact() == (what in UNDONE)
    if what not in UNDONE:
        with pytest.raises(NMBenchError, match="acme changed the model in a way that is not undone"):
            experiment.check_intact("acme")
    digests = experiment.dense.digest, experiment.protocol_digest
    experiment.renew("acme")
    assert experiment.is_intact()
    assert (experiment.dense.digest, experiment.protocol_digest) == digests


def test_changed_copies_are_found(experiment):
    """A method that writes into the dense copies is found, though no intact copy is left to restore from."""
    next(iter(experiment.dense.copies.values())).mul_(2)
    assert not experiment.is_intact()
    experiment.renew("acme")
    assert experiment.is_intact()


def test_another_model_is_refused(experiment):
    """A model that is loaded again with other weights stops the run."""
    experiment.dense.digest = "that of another model"
    with pytest.raises(ModelChanged, match=r"no longer what it was before acme.*without acme"):
        experiment.renew("acme")


def test_fingerprints_are_exact_on_the_cpu():
    """On the CPU one bit of a loss, or one layer, makes another fingerprint."""
    one = Fingerprint(("a", "b"), torch.ones(1))
    assert one.like(Fingerprint(("a", "b"), torch.ones(1)))
    assert not one.like(dataclasses.replace(one, losses=torch.ones(1) + 1e-6))
    assert not one.like(dataclasses.replace(one, layers=("a",)))
    assert one.like(dataclasses.replace(one, losses=torch.ones(1) + 1e-6), tolerance=1e-2)
