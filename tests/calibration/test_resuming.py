"""Laws of resumed forward passes: they are those of the whole model, or the model is found not to be resumable."""

import pytest
import torch

from nmbench.calibration import resumable, resumed, until
from nmbench.models.bundle import Bundle
from nmbench.models.forward import logits_of, run_model
from nmbench_plugins.tiny import FAMILIES, TinyModel
from reference.toys import FORMS, toy

ELSEWHERE = {"one list for all", "one dict for all"}  # forms in which blocks leave something for later blocks


def random_windows() -> torch.Tensor:
    return torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def check_resumed(bundle: Bundle) -> None:
    """From every block on, the logits are, bit for bit, those of a whole pass."""
    windows = random_windows()
    whole = logits_of(run_model(bundle.model, windows))
    for index in range(len(bundle.blocks)):
        with resumed(bundle, index, until(bundle, index, windows)):
            assert torch.equal(logits_of(run_model(bundle.model, windows)), whole)


@pytest.mark.parametrize("form", FORMS)
def test_awkward_models(form):
    """A model is resumable unless its blocks leave something for later blocks elsewhere than in their outputs."""
    assert resumable(toy(form), random_windows()[:1]) == (form not in ELSEWHERE)
    if form not in ELSEWHERE:
        check_resumed(toy(form))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_architectures(family):
    """All tiny models are resumable."""
    bundle = TinyModel().load(family)
    assert resumable(bundle, random_windows()[:1])
    check_resumed(bundle)
