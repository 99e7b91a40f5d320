"""Laws of the built-in repairs, beside those that the test kit holds for every repair."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmbench.methods import LayerStats, Pruned, PrunedModel
from nmbench.models.bundle import Bundle
from nmbench.pattern import Pattern
from nmbench.pruning.blocks import Blocks
from nmbench.pruning.repairing import BlockStore, call_repair, repaired_blocks
from nmbench.results.files import MemoryCheckpoints
from nmbench.testing import strategies
from nmbench_plugins.distil.masters import begun
from nmbench_plugins.leastsquares import LeastSquares
from nmbench_plugins.reconstruct import Reconstruct
from nmbench_plugins.sparsegpt import SparseGPT, SparseGPTRepair
from nmbench_plugins.tiny import TinyModel

quick = settings(max_examples=25, deadline=None)
PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), Pattern(2, 3)]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer in float64: dense weights, inputs X of the pruned and Y of the dense model, the stream's lag, mask."""

    weight: Tensor
    x: Tensor
    y: Tensor
    lag: Tensor
    mask: Tensor
    pattern: Pattern

    def stats(self) -> LayerStats:
        """The statistics of one window, as the host gathers them."""
        gram, drift = 2 * self.x.T @ self.x, 2 * (self.y - self.x).T @ self.x
        lag = 2 * self.lag.T @ self.x
        return LayerStats(1, len(self.x), None, gram.float(), drift.float(), lag.float())

    def target(self, dense: float, residual: float) -> Tensor:
        """The outputs to aim at `[tokens, out]`."""
        return (self.x + (dense - residual) * (self.y - self.x)) @ self.weight.T + residual * self.lag

    def repaired(self, method) -> Pruned:
        start = Pruned(self.mask, self.weight.float().masked_fill(~self.mask, 0.0))
        return call_repair(method, self.weight.float(), self.stats(), start, self.pattern)

    def error(self, weight: Tensor, dense: float = 0.0, residual: float = 0.0) -> float:
        return float((self.x @ weight.double().T - self.target(dense, residual)).square().sum())


@st.composite
def layers(draw) -> Layer:
    pattern, seed = draw(st.sampled_from(PATTERNS)), draw(st.integers(0, 2**31))
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 4)) * pattern.group
    weight = strategies.values("normal", (rows, columns), seed).double()
    x = strategies.values("normal", (4 * columns, columns), seed + 1).double()
    x[:, 1:] += 0.5 * x[:, :-1]
    y = x + 0.2 * strategies.values("normal", tuple(x.shape), seed + 2).double()
    lag = 0.2 * strategies.values("normal", (len(x), rows), seed + 3).double()
    return Layer(weight, x, y, lag, pattern.top(weight.abs()), pattern)


@quick
@given(layers(), st.sampled_from([(0.0, 0.0), (1.0, 0.0), (0.3, 0.3), (0.5, 1.0)]))
def test_least_squares_is_the_minimum_of_its_target(layer, aim):
    """Kept weights solve the float64 normal equations of the target, which is stated with inputs instead of sums."""
    found = layer.repaired(LeastSquares(*("wanda", *aim), solver="exact"))
    target = layer.target(*aim)
    for row, mask in enumerate(layer.mask):
        wanted = torch.linalg.lstsq(layer.x[:, mask], target[:, row, None]).solution[:, 0]
        torch.testing.assert_close(found.weight[row, mask].double(), wanted, rtol=1e-3, atol=1e-4)


@quick
@given(layers(), st.integers(0, 12))
def test_no_repair_beats_least_squares_on_its_statistics(layer, steps):
    """The exact minimum is not above conjugate gradients, SparseGPT's repair, or no repair at all."""
    aim = {"dense_weight": 0.0, "residual_weight": 0.0}
    best = layer.error(layer.repaired(LeastSquares(solver="exact", **aim)).weight)
    others = [LeastSquares(iterations=steps, **aim), SparseGPTRepair(damping=0.0)]
    errors = [layer.error(layer.repaired(method).weight) for method in others]
    unrepaired = layer.error(layer.weight.masked_fill(~layer.mask, 0.0))
    slack = 1e-6 * (1 + unrepaired)
    assert best <= min(errors) + slack
    assert errors[0] <= unrepaired + slack


@quick
@given(layers())
def test_least_squares_under_a_full_mask(layer):
    """Where everything is kept, the dense weights are the minimum."""
    full = dataclasses.replace(layer, mask=torch.ones_like(layer.mask))
    found = full.repaired(LeastSquares(dense_weight=0.0, residual_weight=0.0, solver="exact"))
    torch.testing.assert_close(found.weight.double(), layer.weight, rtol=1e-4, atol=1e-5)


@quick
@given(layers())
def test_sparsegpt_repairs_its_own_mask_as_sparsegpt_does(layer):
    """Under the mask that SparseGPT chose, the repair gives SparseGPT's weights, bit for bit."""
    stats = layer.stats()
    chosen = SparseGPT().solve(layer.weight.float(), stats, layer.pattern)
    own = dataclasses.replace(layer, mask=chosen.mask).repaired(SparseGPTRepair())
    assert torch.equal(own.weight, chosen.weight)


WINDOWS = torch.randint(256, (8, 16), generator=torch.Generator().manual_seed(0))


def by_blocks(method: Reconstruct, bundle: Bundle) -> tuple[Mapping[str, Tensor], list[Mapping[str, float]]]:
    """The weights after a block repair of magnitude's mask, and the figures of every block."""
    pattern = dict.fromkeys(bundle.layers, Pattern(2, 4))
    start = PrunedModel({n: Pruned(Pattern(2, 4).top(layer.read().abs())) for n, layer in bundle.layers.items()})
    blocks = Blocks(bundle, start, pattern, WINDOWS, method.minibatch, method.dense_path)
    stores: dict[int, MemoryCheckpoints] = {}
    made = repaired_blocks(blocks, method, "it", BlockStore(lambda i: stores.setdefault(i, MemoryCheckpoints())))
    return {name: pruned.weight for name, pruned in made.pruned.layers.items()}, list(made.pruned.curve)


@pytest.mark.parametrize("scope", ["block", "module", "layer"])
def test_no_block_ends_with_a_higher_error(scope):
    """The error on calibration windows falls or stays; a step size that is far too large leaves the start."""
    bundle = TinyModel().load("llama")
    _, curve = by_blocks(Reconstruct(scope=scope, steps=6, minibatch=4, learning_rate=3e-3), bundle)
    _, wild = by_blocks(Reconstruct(scope=scope, steps=6, minibatch=4, learning_rate=1e4), TinyModel().load("llama"))
    for point in (*curve, *wild):
        pairs = [(value, point[name.replace("before", "after")]) for name, value in point.items() if "before" in name]
        assert pairs and all(after <= before for before, after in pairs)
    assert any(point[n] < point[n.replace("after", "before")] for point in curve for n in point if "after" in n)


def test_a_target_on_the_pruned_path_needs_no_dense_path():
    """With the target 0, the dense model does not run beside the pruned one, and blocks are repaired all the same."""
    method = Reconstruct(target=0.0, steps=4, minibatch=4)
    assert not method.dense_path
    weights, _ = by_blocks(method, TinyModel().load("gpt2"))
    assert all(weight is not None for weight in weights.values())


def test_norms_are_trained_on_request():
    """With `norms`, other parameters of the block come back as well, and the record says their share."""
    bundle = TinyModel().load("llama")
    pattern = dict.fromkeys(bundle.layers, Pattern(2, 4))
    start = PrunedModel({n: Pruned(Pattern(2, 4).top(layer.read().abs())) for n, layer in bundle.layers.items()})
    method = Reconstruct(norms=True, steps=4, minibatch=4)
    blocks = Blocks(bundle, start, pattern, WINDOWS, method.minibatch)
    pruned = repaired_blocks(blocks, method, "it", BlockStore(lambda i: MemoryCheckpoints())).pruned
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in pruned.others} == {
        "input_layernorm",
        "post_attention_layernorm",
    }
    assert 0 < pruned.notes["share_of_trained"] < 0.1


@quick
@given(layers())
def test_dropped_masters_begin_below_the_kept_ones(layer):
    """Where the mask is chosen anew, the first choice by magnitude is the start's mask."""
    kept = layer.weight.masked_fill(~layer.mask, 0.0)
    masters = kept + begun(layer.weight, kept, layer.mask, layer.pattern)
    assert torch.equal(layer.pattern.top(masters.abs()), layer.mask)


@pytest.mark.parametrize(("windows", "steps", "read"), [(None, 5, 40), (256, 5, 40), (30, 5, 30), (None, 0, 8)])
def test_reconstruct_asks_for_no_more_windows_than_it_reads(windows, steps, read):
    """Windows beyond the updates' minibatches would only cost passes and memory."""
    assert Reconstruct(windows=windows, steps=steps).windows_read == read
