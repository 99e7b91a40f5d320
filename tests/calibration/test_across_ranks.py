"""Laws of ranks in a walk: statistics, masks and costs are those of one process, on every rank, and so are errors."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from nmbench.calibration.across_ranks import dealt_out
from nmbench.calibration.walk import walk
from nmbench.errors import NMBenchError
from nmbench.methods import Baseline, Pruned, PrunedModel, Solver, Stat
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.models.hashing import masks_checksum
from nmbench.pattern import Pattern
from nmbench.pruning.one_shot import Made, prune_one_shot
from nmbench.pruning.repairing import repaired_layers
from nmbench.runtime.ranks import ALONE, Ranks
from nmbench_plugins.sparsegpt import SparseGPT
from nmbench_plugins.swaps import Swaps
from nmbench_plugins.tiny import TinyModel
from nmbench_plugins.wanda import Wanda
from reference.ranks import by_threads
from reference.repairs import Rescale

ALL = Stat.INPUT_NORM | Stat.GRAM | Stat.DRIFT | Stat.LAG
PLAIN = Stat.INPUT_NORM | Stat.GRAM
FIGURES = ("input_norm", "gram", "drift", "lag")


def on_ranks(size: int, work: Callable[[Ranks, Bundle], Any], family: str = "llama") -> list[Any]:
    """The results of `work` on each of `size` ranks, all with the same model."""
    bundles = [TinyModel().load(family) for _ in range(size)]  # here: threads share the generator of the process
    return by_threads(size, lambda ranks: work(ranks, bundles[ranks.rank]))


def by_one(work: Callable[[Ranks, Bundle], Any], family: str = "llama") -> Any:
    """The result of `work` in one process."""
    return work(ALONE, TinyModel().load(family))


def windows_of(count: int) -> Tensor:
    return torch.randint(256, (count, 24), generator=torch.Generator().manual_seed(0))


def seen(ranks: Ranks, bundle: Bundle, needs: Stat, sequential: bool, windows: Tensor) -> list[tuple]:
    """The counts and the statistics of every step of a walk that halves the weights of each layer."""
    steps = []
    for step in walk(bundle, windows, needs, sequential, tokens_at_once=48, ranks=ranks):
        for layer in step.layers:
            layer.write(layer.read() / 2)
        tokens = {name: stats.tokens for name, stats in step.stats.items()}
        steps.append(((step.index, list(tokens.items()), step.last, step.block_tokens, step.fallbacks), step.stats))
    return steps


@pytest.mark.parametrize(
    ("family", "needs", "sequential", "windows", "size"),
    [
        ("llama", ALL, True, 6, 2),
        ("gpt2", ALL, False, 8, 3),
        ("llama", PLAIN, False, 2, 3),  # a rank without a window
        ("mixtral", PLAIN, True, 6, 2),
        ("mixtral", PLAIN, False, 1, 2),  # experts that no token reaches
    ],
)
def test_statistics_are_those_of_all_windows(family, needs, sequential, windows, size):
    """Counts are those of one process; statistics to 1e-5 of the largest one, and the same bits on every rank."""
    how = needs, sequential, windows_of(windows)
    alone = by_one(lambda ranks, bundle: seen(ranks, bundle, *how), family)
    first, *others = on_ranks(size, lambda ranks, bundle: seen(ranks, bundle, *how), family)
    for theirs in (first, *others):
        assert [counts for counts, _ in theirs] == [counts for counts, _ in alone]
    for (_, stats), (_, wanted), *same in zip(first, alone, *others, strict=True):
        for name, figure in ((name, figure) for name in wanted for figure in FIGURES):
            values, expected = getattr(stats[name], figure), getattr(wanted[name], figure)
            assert (values is None) == (expected is None)
            if values is not None:
                torch.testing.assert_close(values, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
                assert all(values.equal(getattr(other[name], figure)) for _, other in same)


def pruned_by(method: Baseline, ranks: Ranks, bundle: Bundle, deferred: bool = False, streamed: bool = False) -> Made:
    """The whole model pruned; the weights are dense again, whatever happens."""
    if streamed:
        bundle.stream(torch.device("cpu"))
    dense, patterns = DenseWeights(bundle), dict.fromkeys(bundle.layers, Pattern(2, 4))
    init = Wanda() if isinstance(method, Swaps) else None
    given = (method, patterns, windows_of(8), "it")
    try:
        return prune_one_shot(bundle, dense, *given, init=init, deferred=deferred, ranks=ranks)
    finally:
        assert bundle.digest() == dense.digest


def repaired(ranks: Ranks, bundle: Bundle) -> Made:
    """A layer repair of magnitude masks."""
    patterns = dict.fromkeys(bundle.layers, Pattern(2, 4))
    start = PrunedModel({name: Pruned(Pattern(2, 4).top(la.read().abs())) for name, la in bundle.layers.items()})
    given = (patterns, windows_of(8), "it", start)
    return repaired_layers(bundle, DenseWeights(bundle), Rescale(), *given, ranks=ranks)


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(pruned_by, Wanda()),
        functools.partial(pruned_by, Wanda(), deferred=True),
        functools.partial(pruned_by, SparseGPT()),
        functools.partial(pruned_by, SparseGPT(), streamed=True),
        functools.partial(pruned_by, Swaps(sequential=True)),
        repaired,
    ],
    ids=["wanda", "checked later", "sparsegpt", "streamed", "swaps", "a layer repair"],
)
def test_masks_are_those_of_one_process(make, monkeypatch):
    """Masks and costs are equal; weights are the same bits on both ranks, and those of one process to 1e-4."""
    module = importlib.import_module("nmbench.calibration.walk")  # the package has a function of this name
    monkeypatch.setattr(module, "BATCH_TOKENS", 48)  # a first batch is as large on a rank as alone
    alone = by_one(make)
    one, two = on_ranks(2, make)
    assert one.cost == two.cost == alone.cost
    for name, wanted in alone.pruned.layers.items():
        layers = one.pruned.layers[name], two.pruned.layers[name]
        assert all(layer.mask.equal(wanted.mask) and layer.figures.keys() == wanted.figures.keys() for layer in layers)
        assert layers[0].note == layers[1].note and layers[0].figures == layers[1].figures
        if wanted.weight is not None:
            assert layers[0].weight.equal(layers[1].weight)
            torch.testing.assert_close(layers[0].weight, wanted.weight, rtol=1e-4, atol=1e-4)


@dataclass(frozen=True)
class Counted(Solver):
    """Counts its calls, and fails for the layers of one width."""

    needs = Stat.INPUT_NORM
    calls: tuple[list, ...] = ()
    fails: int = 0

    def solve(self, weight, stats, pattern):
        self.calls[0].append(weight.shape)
        if weight.shape[1] == self.fails:
            raise ValueError("no luck")
        return Pruned(pattern.top(weight.abs()), None, "a note", {"figure": 1.0})


def test_every_layer_is_made_by_one_rank():
    """Two ranks call a solver as often as one process does, both of them some times; notes and figures arrive."""
    calls = [], [], []
    alone = by_one(functools.partial(pruned_by, Counted(calls=calls[2:])))
    found = on_ranks(2, lambda ranks, bundle: pruned_by(Counted(calls=calls[ranks.rank :]), ranks, bundle))
    assert sorted(calls[0] + calls[1]) == sorted(calls[2])
    assert calls[0] and calls[1]
    for made in found:
        assert (made.pruned.layer_notes, made.pruned.figures) == (alone.pruned.layer_notes, alone.pruned.figures)


def test_the_largest_layers_are_dealt_out_first():
    """The rank with the largest layer gets no other one until the others have as much to do."""
    bundle = TinyModel().load("llama")
    owners = dealt_out(bundle.block_layers(0), 2)
    down = "model.layers.0.mlp.down_proj"
    assert owners[down] == 0
    assert {rank for name, rank in owners.items() if "gate" in name or "up_proj" in name} == {1}
    assert set(dealt_out(bundle.block_layers(0), 1).values()) == {0}


@pytest.mark.parametrize("fails", [96, 64])
def test_an_error_of_one_rank_is_an_error_of_all(fails):
    """The rank that made the layer names it; the others name that rank, and no rank waits for another."""

    def failing(ranks, bundle):
        with pytest.raises(NMBenchError) as raised:
            pruned_by(Counted(calls=([],), fails=fails), ranks, bundle)
        return str(raised.value)

    lines = on_ranks(2, failing)
    assert all(line.endswith("ValueError: no luck") and "it failed in model.layers.0." in line for line in lines)
    if fails == 96:
        assert lines == ["it failed in model.layers.0.mlp.down_proj: ValueError: no luck", f"rank 0: {lines[0]}"]


def test_ranks_with_other_masks_are_found():
    """A scorer runs on every rank, and its masks are compared."""

    def spoiled(ranks, bundle):
        other = type("Other", (Wanda,), {"score": lambda self, weight, stats: -weight.abs()})
        return pruned_by(other() if ranks.rank else Wanda(), ranks, bundle)

    with pytest.raises(NMBenchError, match="ranks 0 and 1 hold different masks"):
        on_ranks(2, spoiled)


def test_a_checksum_sees_every_bit():
    """Any flipped bit, two exchanged layers and two exchanged words change the checksum; a copy or view does not."""
    masks = {"a": torch.rand(3, 12) > 0.5, "b": torch.rand(3, 12) > 0.5}
    wanted = masks_checksum(masks)
    assert masks_checksum({name: masks[name].clone() for name in ("b", "a")}) == wanted
    assert masks_checksum({**masks, "a": torch.cat([masks["b"][:1], masks["a"]])[1:]}) == wanted
    assert masks_checksum({"a": masks["b"], "b": masks["a"]}) != wanted
    assert masks_checksum({**masks, "a": masks["a"].flatten().roll(8).view(3, 12)}) != wanted
    for bit in range(36):
        flipped = masks["a"].clone()
        flipped.view(-1)[bit] ^= True
        assert masks_checksum({**masks, "a": flipped}) != wanted
