"""Laws of common inputs: gathered once, and only where two layers are given the very same tensor every time."""

import pytest
import torch

from nmbench.calibration.shared_inputs import CommonInputs
from nmbench.calibration.statistics import Gatherer
from nmbench.calibration.walk import walk
from nmbench.methods import Stat
from nmbench_plugins.tiny import FAMILIES, TinyModel

BOTH = Stat.INPUT_NORM | Stat.GRAM


def windows() -> torch.Tensor:
    return torch.randint(256, (7, 24), generator=torch.Generator().manual_seed(0))


def gathered(bundle, monkeypatch, shared=True):
    """The statistics of a walk by layer name; with common inputs, or every layer alone."""
    everything = {name.split(".", 3)[-1] for name in bundle.layers}
    with monkeypatch.context() as patch:
        if not shared:
            patch.setattr("nmbench.calibration.block_visit.CommonInputs", lambda alone: CommonInputs(everything))
        steps = walk(bundle, windows(), BOTH, tokens_at_once=3 * 24)
        return {name: stats for step in steps for name, stats in step.stats.items()}


def test_counts_of_several_processes():
    """A layer leads another one if it does so in every process that runs both; in one process without is no matter."""
    x, y = torch.zeros(2), torch.zeros(2)

    def counts(*pairs):
        common = CommonInputs()
        for first, second in pairs:
            common.once("a", lambda inputs: None)(first)
            common.once("b", lambda inputs: None)(second)
        return common.counts

    for processes, leaders in (
        ([counts((x, x)), counts((y, y), (x, x)), counts()], {"b": "a"}),
        ([counts((x, x)), counts((x, y))], None),
        ([counts((x, y)), counts()], {}),
    ):
        common = CommonInputs()
        common.pool(processes)
        assert common.leaders() == leaders


def assert_equal(some, others):
    assert some.keys() == others.keys()
    for name, stats in some.items():
        assert (stats.windows, stats.tokens) == (others[name].windows, others[name].tokens)
        assert torch.equal(stats.input_norm, others[name].input_norm)
        assert torch.equal(stats.gram, others[name].gram)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_nothing_changes(family, monkeypatch):
    """Statistics are, bit for bit, those that every layer gathers alone."""
    bundle = TinyModel().load(family)
    assert_equal(gathered(bundle, monkeypatch), gathered(bundle, monkeypatch, shared=False))


def test_gathered_once(monkeypatch):
    """Of layers that are given the same tensor only the first gathers; the others are lent copies of their own."""
    told = []
    monkeypatch.setattr(Gatherer, "add", lambda self, inputs, add=Gatherer.add: (told.append(self), add(self, inputs)))
    stats = gathered(TinyModel().load("llama"), monkeypatch)
    assert len(told) == 2 * 3 * 4  # blocks, batches, inputs: of q k v, o, gate up, down
    leader, follower = (stats[f"model.layers.0.self_attn.{name}"].gram for name in ("q_proj", "k_proj"))
    assert torch.equal(leader, follower)
    assert leader.data_ptr() != follower.data_ptr()


@pytest.mark.parametrize("spoil", ["in place", "at times"])
def test_inputs_that_are_not_common(spoil, monkeypatch):
    """A layer that is given the same tensor, but written to, or another one now and then, has its own statistics."""
    bundle = TinyModel().load("llama")

    def change(module, args):
        if spoil == "in place":
            args[0].add_(1)
        return (args[0] + 1,) if spoil == "at times" and len(args[0]) == 1 else None

    bundle.model.model.layers[0].self_attn.k_proj.register_forward_pre_hook(change)
    stats = gathered(bundle, monkeypatch)
    assert_equal(stats, gathered(bundle, monkeypatch, shared=False))
    q, k, v = (stats[f"model.layers.0.self_attn.{name}_proj"].input_norm for name in "qkv")
    assert not torch.allclose(q, k)
    assert torch.equal(v, k) == (spoil == "in place")


def test_who_leads():
    """A leader is who was told just before, every time; who is told more often, or at times by himself, has none."""
    x, y, z = torch.ones(2), torch.ones(2), torch.ones(2)
    heard = []

    def leaders(*calls, alone=()):
        common = CommonInputs(alone)
        for name, tensor in calls:
            common.once(name, heard.append)(tensor)
        return common.leaders()

    assert leaders(("q", x), ("k", x), ("o", y), ("q", z), ("k", z)) == {"k": "q"}
    assert leaders(("q", x), ("k", y)) == {}
    assert leaders(("q", x), ("k", x), alone=("k",)) == {}
    assert leaders(("q", x), ("q", x), ("k", y)) == {}
    assert leaders(("q", x), ("k", x), ("q", y), ("k", x)) is None
    assert leaders(("q", x), ("k", x), ("k", x)) is None
    assert leaders(("q", x), ("k", x), ("o", y), ("k", y)) is None
