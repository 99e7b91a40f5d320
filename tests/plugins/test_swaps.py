"""Laws of swaps: exact refinement of masks on frozen weights, and equality with plain loops."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmbench.errors import NMBenchError
from nmbench.methods import LayerStats, Stat
from nmbench.pattern import Pattern
from nmbench.testing import strategies
from nmbench_plugins.swaps import Problem, Swaps, sweep
from nmbench_plugins.wanda import Wanda
from reference import swaps as plain

quick = settings(max_examples=40, deadline=None)
PATTERNS = [Pattern(*pair) for pair in ((1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (3, 6), (2, 3), (8, 16), (5, 10))]
FEW = [pattern for pattern in PATTERNS if pattern.group < 10]  # all patterns of a group are compared
seeds = st.integers(0, 2**31)
UNTIL_DONE = 200  # sweeps


def inputs_of(columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Correlated inputs of a layer and, near them, those in the dense model: float64 `[tokens, columns]`."""
    x = strategies.values("normal", (3 * columns, columns), seed).double()
    x[:, 1:] += 0.7 * x[:, :-1]
    return x, x + 0.3 * strategies.values("normal", x.shape, seed + 1).double()


def stats_of(x: Tensor, y: Tensor) -> LayerStats:
    norm = x.square().sum(dim=0).sqrt()
    return LayerStats(1, len(x), norm.float(), (2 * x.T @ x).float(), (2 * (y - x).T @ x).float())


@st.composite
def cases(draw: st.DrawFn, patterns: list[Pattern] = PATTERNS, max_groups: int = 4):
    """A weight, inputs here and in the dense model, a random mask and its pattern."""
    pattern, seed = draw(st.sampled_from(patterns)), draw(seeds)
    shape = (draw(st.integers(1, 5)), pattern.group * draw(st.integers(1, max_groups)))
    weight = strategies.values("normal", shape, seed)
    mask = pattern.top(strategies.values("normal", shape, seed + 7))
    return weight, *inputs_of(shape[1], seed + 1), mask, pattern


def distance(weight: Tensor, mask: Tensor, x: Tensor, target: Tensor) -> Tensor:
    """The squared distance `[out]` of a masked layer's outputs from those of the dense weights on `target`."""
    w = weight.double()
    return (x @ (w * mask).T - target @ w.T).square().sum(dim=0)


def towards(x: Tensor, y: Tensor, dense_weight: float) -> Tensor:
    return x + dense_weight * (y - x)


weights_of_dense = st.sampled_from([0.0, 0.4, 1.0])


# What comes back


@quick
@given(st.data())
def test_masks_are_strict(data):
    """Whatever the weights, inputs and initial mask, exactly N of every M are kept and nothing handed over changes."""
    pattern = data.draw(st.sampled_from(PATTERNS))
    weight = data.draw(strategies.tensors(pattern))
    mask = pattern.top(strategies.values("normal", weight.shape, data.draw(seeds)))
    x = strategies.values(data.draw(st.sampled_from(strategies.KINDS[:4])), (12, weight.shape[1]), data.draw(seeds))
    stats = stats_of(x.double(), x.double().roll(1, 0))
    before = [tensor.clone() for tensor in (weight, mask, stats.gram, stats.drift)]
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    pruned = Swaps(sweeps=3, dense_weight=data.draw(weights_of_dense)).refine(weight.to(dtype), stats, mask, pattern)
    assert pruned.mask.dtype == torch.bool
    assert pruned.mask.shape == weight.shape
    assert (pattern.kept(pruned.mask) == pattern.keep).all()
    assert pruned.weight is None
    assert all(np.isfinite(value) for value in pruned.figures.values())
    assert all(map(torch.equal, before, (weight, mask, stats.gram, stats.drift)))


@quick
@given(cases(), weights_of_dense)
def test_no_sweep_raises_the_error(case, dense_weight):
    """Sweep by sweep, no row gets further from its target."""
    weight, x, y, mask, pattern = case
    target, stats = towards(x, y, dense_weight), stats_of(x, y)
    errors = [distance(weight, mask, x, target)]
    for sweeps in range(1, 5):
        now = Swaps(sweeps=sweeps, dense_weight=dense_weight).refine(weight, stats, mask, pattern).mask
        errors.append(distance(weight, now, x, target))
    for before, after in itertools.pairwise(errors):
        assert (after <= before * (1 + 1e-5)).all()


@quick
@given(cases(), weights_of_dense)
def test_refined_masks_stay(case, dense_weight):
    """Where a refinement has come to its end, a second one changes nothing and takes one sweep."""
    weight, x, y, mask, pattern = case
    method, stats = Swaps(sweeps=UNTIL_DONE, dense_weight=dense_weight), stats_of(x, y)
    first = method.refine(weight, stats, mask, pattern)
    assert first.figures["sweeps"] < UNTIL_DONE
    again = method.refine(weight, stats, first.mask, pattern)
    assert torch.equal(again.mask, first.mask)
    assert again.figures == {"error_fall": 0.0, "groups_changed": 0.0, "sweeps": 1.0}


@quick
@given(cases(), weights_of_dense)
def test_figures(case, dense_weight):
    """How far the error fell, relative to that of the initial mask on these inputs, and the share of groups changed."""
    weight, x, y, mask, pattern = case
    target = towards(x, y, dense_weight)
    pruned = Swaps(dense_weight=dense_weight).refine(weight, stats_of(x, y), mask, pattern)
    fall = distance(weight, mask, x, target).sum() - distance(weight, pruned.mask, x, target).sum()
    assert pruned.figures["error_fall"] == pytest.approx(float(fall / distance(weight, mask, x, x).sum()), abs=1e-4)
    changed = pattern.groups(pruned.mask != mask).any(dim=-1).float().mean()
    assert pruned.figures["groups_changed"] == pytest.approx(float(changed))


# Where the answer is known


@quick
@given(cases(FEW, max_groups=1), weights_of_dense)
def test_one_group_is_solved_exactly(case, dense_weight):
    """A layer of one group gets the best of all its patterns in every row."""
    weight, x, y, mask, pattern = case
    target = towards(x, y, dense_weight)
    pruned = Swaps(sweeps=1, dense_weight=dense_weight).refine(weight, stats_of(x, y), mask, pattern)
    every = [
        torch.zeros(pattern.group, dtype=torch.bool).index_fill(0, torch.tensor(kept), True)
        for kept in itertools.combinations(range(pattern.group), pattern.keep)
    ]
    least = torch.stack([distance(weight, mask, x, target) for mask in every]).amin(dim=0)
    torch.testing.assert_close(distance(weight, pruned.mask, x, target), least, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dense_weight", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(
    "pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), Pattern(3, 6), Pattern(8, 16)], ids=str
)
def test_masks_equal_plain_loops(pattern, dense_weight):
    """Sweep by sweep the masks are those of plain loops that compute the whole error of every candidate."""
    x, y = inputs_of(3 * pattern.group, 1)
    weight = strategies.values("normal", (4, 3 * pattern.group), 2)
    mask = pattern.top(Wanda().score(weight, stats_of(x, y)))
    arrays = x.numpy(), towards(x, y, dense_weight).numpy()
    rows = zip(weight.double().numpy(), mask.numpy(), strict=True)
    histories = [plain.refine_row(w, kept, *arrays, pattern.group, UNTIL_DONE) for w, kept in rows]
    longest = max(map(len, histories))
    for sweeps in range(1, longest):
        method = Swaps(sweeps=sweeps, dense_weight=dense_weight)
        pruned = method.refine(weight, stats_of(x, y), mask, pattern)
        expected = [history[min(sweeps, len(history) - 1)] for history in histories]
        assert torch.equal(pruned.mask, torch.from_numpy(np.array(expected))), sweeps
    assert longest > 2
    assert (
        Swaps(sweeps=UNTIL_DONE, dense_weight=dense_weight)
        .refine(weight, stats_of(x, y), mask, pattern)
        .figures["sweeps"]
        == longest - 1
    )


@quick
@given(cases())
def test_uncorrelated_inputs_give_wandas_mask(case):
    """With a diagonal Gram matrix, Wanda's mask results from any other (away from near-ties)."""
    weight, x, _, mask, pattern = case
    energy = x.square().sum(dim=0).float()
    stats = LayerStats(1, len(x), energy.sqrt(), torch.diag(2 * energy))
    score = Wanda().score(weight, stats)
    ordered = pattern.groups(score).sort(dim=-1, descending=True).values
    assume(bool((ordered[..., pattern.keep - 1] > ordered[..., pattern.keep] * 1.001).all()))
    assert torch.equal(
        Swaps(sweeps=UNTIL_DONE, dense_weight=0).refine(weight, stats, mask, pattern).mask, pattern.top(score)
    )


@quick
@given(cases(), weights_of_dense)
def test_without_drift_all_targets_are_one(case, dense_weight):
    """Where pruned and dense inputs are the same, the dense model's outputs are those on the inputs at hand."""
    weight, x, _, mask, pattern = case
    one = Swaps(dense_weight=dense_weight).refine(weight, stats_of(x, x), mask, pattern)
    assert torch.equal(one.mask, Swaps(dense_weight=0).refine(weight, stats_of(x, x), mask, pattern).mask)


def test_nothing_to_gain_changes_nothing():
    """Where all inputs are zero, or all weights, every mask is as good and the initial one stays."""
    pattern, mask = Pattern(2, 4), Pattern(2, 4).top(torch.randn(3, 8))
    dead = LayerStats(1, 8, gram=torch.zeros(8, 8))
    assert torch.equal(Swaps(dense_weight=0).refine(torch.randn(3, 8), dead, mask, pattern).mask, mask)
    assert torch.equal(Swaps().refine(torch.zeros(3, 8), stats_of(*inputs_of(8, 0)), mask, pattern).mask, mask)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(8, 16)], ids=str)
def test_correlated_inputs_beat_wanda(pattern):
    """On correlated inputs the error of Wanda's mask falls by a tenth and more."""
    x, y = inputs_of(96, 0)
    weight = strategies.values("normal", (32, 96), 3)
    mask = pattern.top(Wanda().score(weight, stats_of(x, y)))
    pruned = Swaps(dense_weight=0).refine(weight, stats_of(x, y), mask, pattern)
    assert distance(weight, pruned.mask, x, x).sum() < 0.9 * distance(weight, mask, x, x).sum()


# Symmetries


@quick
@given(cases(), seeds, weights_of_dense)
def test_rows_do_not_see_each_other(case, seed, dense_weight):
    """Rows in another order, or some of them alone, get the same masks."""
    weight, x, y, mask, pattern = case
    method, stats = Swaps(dense_weight=dense_weight), stats_of(x, y)
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))[: 1 + seed % len(weight)]
    whole = method.refine(weight, stats, mask, pattern).mask
    assert torch.equal(method.refine(weight[order], stats, mask[order], pattern).mask, whole[order])


@quick
@given(cases(), st.integers(-60, 60), st.integers(-30, 30))
def test_scales_do_not_matter(case, rows, inputs):
    """Weights and inputs multiplied by powers of two get the same mask."""
    weight, x, y, mask, pattern = case
    scaled = stats_of(x * 2.0**inputs, y * 2.0**inputs)
    one = Swaps(dense_weight=0.5).refine(weight, stats_of(x, y), mask, pattern).mask
    assert torch.equal(Swaps(dense_weight=0.5).refine(weight * 2.0**rows, scaled, mask, pattern).mask, one)


@quick
@given(cases(), st.integers(1, 80))
def test_block_size_does_not_matter(case, columns):
    """A sweep in blocks of any width chooses the same masks as one block of everything."""
    weight, x, y, mask, pattern = case
    stats = stats_of(x, y)
    problem = Problem.of(weight, stats.gram, stats.drift, pattern)
    dropped = (~mask).t().float().contiguous()
    assert torch.equal(sweep(problem, dropped, columns), sweep(problem, dropped, 10_000))


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(8, 16)], ids=str)
def test_rows_in_parts(pattern, monkeypatch):
    """Rows that are swept a few at a time, for want of memory, get the same masks."""
    x, y = inputs_of(2 * pattern.group, 3)
    weight = strategies.values("normal", (7, 2 * pattern.group), 4)
    mask, stats = pattern.top(weight.abs()), stats_of(x, y)
    whole = Swaps().refine(weight, stats, mask, pattern)
    monkeypatch.setattr("nmbench_plugins.swaps.MOST_PAIRS", 3 * pattern.group**2)
    assert torch.equal(Swaps().refine(weight, stats, mask, pattern).mask, whole.mask)


# Options


@pytest.mark.parametrize("options", [{"sweeps": 0}, {"dense_weight": -0.1}, {"dense_weight": 1.1}])
def test_impossible_options(options):
    """No sweep at all, and a target beyond both ends, are refused."""
    with pytest.raises(NMBenchError, match="swaps needs sweeps >= 1 and dense_weight from 0 to 1"):
        Swaps(**options)


def test_needs_depend_on_the_target():
    """The dense model is walked along only where its outputs are aimed at."""
    assert Swaps(dense_weight=0.0).needs == Stat.GRAM
    assert Swaps(dense_weight=0.1).needs == Stat.GRAM | Stat.DRIFT
