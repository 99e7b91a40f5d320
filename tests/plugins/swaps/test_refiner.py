"""Laws of swaps: exact refinement of masks on frozen weights, and equality with plain loops."""

import dataclasses
import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmbench.errors import NMBenchError
from nmbench.methods import LayerStats, Pruned, Stat
from nmbench.pattern import Pattern
from nmbench.testing import strategies
from nmbench_plugins.swaps.descent import descend, sweep
from nmbench_plugins.swaps.problem import Problem
from nmbench_plugins.swaps.refiner import Swaps
from nmbench_plugins.wanda import Wanda
from reference import swaps as plain
from reference.tiers import tiered

quick = settings(max_examples=24, deadline=None)
PATTERNS = [Pattern(*pair) for pair in ((1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (3, 6), (2, 3), (8, 16), (5, 10))]
PATTERNS += map(Pattern.parse, ("2:4x2", "1:2x3", "5:10x2"))
FEW = [pattern for pattern in PATTERNS if pattern.units.group < 10]  # all patterns of a group are compared
seeds = st.integers(0, 2**31)
UNTIL_DONE = 200  # sweeps


@dataclass(frozen=True)
class Case:
    """A weight `[out, in]`, its mask, and what goes into the layer and to where it writes.

    `x`, `y` float64 `[tokens, in]`: correlated inputs and, near them, those in the dense model. `behind` float64
    `[tokens, out]`: by how much what the outputs are added to is larger in the dense model; in part a function of x.
    """

    weight: Tensor
    x: Tensor
    y: Tensor
    behind: Tensor
    mask: Tensor
    pattern: Pattern

    @classmethod
    def of(cls, rows: int, groups: int, pattern: Pattern, seed: int) -> "Case":
        shape = (rows, pattern.group * groups)
        x = strategies.values("normal", (3 * shape[1], shape[1]), seed + 1).double()
        x[:, 1:] += 0.7 * x[:, :-1]
        y = x + 0.3 * strategies.values("normal", x.shape, seed + 2).double()
        behind = strategies.values("normal", (len(x), rows), seed + 3).double()
        behind += 0.5 * x @ strategies.values("normal", shape, seed + 4).double().T
        mask = pattern.top(strategies.values("normal", shape, seed + 7))
        return cls(strategies.values("normal", shape, seed), x, y, behind, mask, pattern)

    @property
    def stats(self) -> LayerStats:
        return stats_of(self.x, self.y, self.behind + (self.y - self.x) @ self.weight.double().T)

    def goal(self, dense_weight: float, residual_weight: float) -> Tensor:
        """The outputs `[tokens, out]` that are aimed at."""
        inputs = self.x + dense_weight * (self.y - self.x)
        return inputs @ self.weight.double().T + residual_weight * self.behind

    def error(self, mask: Tensor, dense_weight: float, residual_weight: float) -> Tensor:
        """The squared distance `[out]` of the masked layer's outputs from the goal."""
        outputs = self.x @ (self.weight.double() * mask).T
        return (outputs - self.goal(dense_weight, residual_weight)).square().sum(dim=0)

    def refined(self, **options: float) -> Pruned:
        return Swaps(**options).refine(self.weight, self.stats, self.mask, self.pattern)


def stats_of(x: Tensor, y: Tensor, lag: Tensor | None = None) -> LayerStats:
    """The statistics of inputs, of their drift, and of how far the residual stream `[tokens, out]` lags behind."""
    norm = x.square().sum(dim=0).sqrt()
    gram, drift = (2 * x.T @ x).float(), (2 * (y - x).T @ x).float()
    return LayerStats(1, len(x), norm.float(), gram, drift, None if lag is None else (2 * lag.T @ x).float())


@st.composite
def cases(draw: st.DrawFn, patterns: list[Pattern] = PATTERNS, max_groups: int = 4) -> Case:
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, max_groups))
    return Case.of(rows, groups, draw(st.sampled_from(patterns)), draw(seeds))


TARGETS = [(0.0, 0.0), (0.4, 0.0), (1.0, 0.0), (0.0, 0.7), (0.3, 0.3), (0.2, 1.0)]
targets = st.sampled_from([{"dense_weight": a, "residual_weight": b} for a, b in TARGETS])
HERE = {"dense_weight": 0, "residual_weight": 0}  # the outputs on the inputs at hand


# What comes back


@quick
@given(st.data())
def test_masks_are_strict(data):
    """Whatever the weights, inputs and initial mask, exactly N of every M are kept and nothing handed over changes."""
    pattern = data.draw(st.sampled_from(PATTERNS))
    weight = data.draw(strategies.tensors(pattern))
    mask = pattern.top(strategies.values("normal", weight.shape, data.draw(seeds)))
    x = strategies.values(data.draw(st.sampled_from(strategies.KINDS[:4])), (12, weight.shape[1]), data.draw(seeds))
    stream = strategies.values("normal", (12, weight.shape[0]), data.draw(seeds)).double()
    stats = stats_of(x.double(), x.double().roll(1, 0), data.draw(st.sampled_from([None, stream])))
    handed = [tensor for tensor in (weight, mask, stats.gram, stats.drift, stats.lag) if tensor is not None]
    before = [tensor.clone() for tensor in handed]
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    pruned = Swaps(sweeps=3, **data.draw(targets)).refine(weight.to(dtype), stats, mask, pattern)
    assert pruned.mask.dtype == torch.bool
    assert pruned.mask.shape == weight.shape
    assert not pattern.broken(pruned.mask).any()
    assert pruned.weight is None
    assert all(np.isfinite(value) for value in pruned.figures.values())
    assert all(map(torch.equal, before, handed))


@quick
@given(cases(), targets)
def test_no_sweep_raises_the_error(case, target):
    """Sweep by sweep, no row gets further from its goal."""
    errors = [case.error(case.mask, **target)]
    errors += [case.error(case.refined(sweeps=sweeps, **target).mask, **target) for sweeps in range(1, 5)]
    for before, after in itertools.pairwise(errors):
        assert (after <= before * (1 + 1e-5)).all()


@quick
@given(cases(), targets)
def test_refined_masks_stay(case, target):
    """Where a refinement has come to its end, a second one changes nothing and takes one sweep."""
    first = case.refined(sweeps=UNTIL_DONE, **target)
    assert first.figures["sweeps"] < UNTIL_DONE
    again = Swaps(sweeps=UNTIL_DONE, **target).refine(case.weight, case.stats, first.mask, case.pattern)
    assert torch.equal(again.mask, first.mask)
    assert again.figures == {"error_fall": 0.0, "groups_changed": 0.0, "sweeps": 1.0}


@quick
@given(cases(), targets)
def test_figures(case, target):
    """How far the error fell, relative to that of the initial mask on these inputs, and the share of groups changed."""
    pruned = case.refined(**target)
    fall = case.error(case.mask, **target).sum() - case.error(pruned.mask, **target).sum()
    whole = float(case.error(case.mask, **HERE).sum())
    assert pruned.figures["error_fall"] == pytest.approx(float(fall) / whole, rel=1e-4, abs=1e-4)
    changed = case.pattern.groups(pruned.mask != case.mask).any(dim=-1).float().mean()
    assert pruned.figures["groups_changed"] == pytest.approx(float(changed))


# Where the answer is known


@quick
@given(cases(FEW, max_groups=1), targets)
def test_one_group_is_solved_exactly(case, target):
    """A layer of one group gets the best of all its patterns in every row."""
    pruned, units = case.refined(sweeps=1, **target), case.pattern.units
    every = [
        case.pattern.whole(torch.zeros(units.group, dtype=torch.bool).index_fill(0, torch.tensor(kept), True))
        for kept in itertools.combinations(range(units.group), units.keep)
    ]
    least = torch.stack([case.error(mask, **target) for mask in every]).amin(dim=0)
    torch.testing.assert_close(case.error(pruned.mask, **target), least, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "weights"),
    tiered(
        ("2:4", "1:4", "4:8", "3:6", "8:16", "2:4x2", "5:10x2"),
        TARGETS,
        fast=lambda text, weights: text == "2:4" or weights in ((0.0, 0.0), (0.3, 0.3)),
    ),
)
def test_masks_equal_plain_loops(text, weights):
    """Sweep by sweep the masks are those of plain loops that compute the whole error of every candidate."""
    pattern, target = Pattern.parse(text), dict(zip(("dense_weight", "residual_weight"), weights, strict=True))
    case = Case.of(4, 3, pattern, 1)
    goals = case.goal(**target).T.numpy()
    rows = zip(case.weight.double().numpy(), case.mask.numpy(), goals, strict=True)
    sizes = pattern.group, pattern.unit
    histories = [plain.refine_row(w, kept, case.x.numpy(), g, *sizes, UNTIL_DONE) for w, kept, g in rows]
    longest = max(map(len, histories))
    for sweeps in range(1, longest):
        expected = [history[min(sweeps, len(history) - 1)] for history in histories]
        assert torch.equal(case.refined(sweeps=sweeps, **target).mask, torch.from_numpy(np.array(expected))), sweeps
    assert longest > 2
    assert case.refined(sweeps=UNTIL_DONE, **target).figures["sweeps"] == longest - 1


@quick
@given(cases())
def test_uncorrelated_inputs_give_wandas_mask(case):
    """With a diagonal Gram matrix, Wanda's mask results from any other (away from near-ties)."""
    energy = case.x.square().sum(dim=0).float()
    stats = LayerStats(1, len(case.x), energy.sqrt(), torch.diag(2 * energy))
    score, units = Wanda().score(case.weight, stats), case.pattern.units
    ordered = units.groups(case.pattern.unit_scores(score, 2)).sort(dim=-1, descending=True).values
    assume(bool((ordered[..., units.keep - 1] > ordered[..., units.keep] * 1.001).all()))
    refined = Swaps(sweeps=UNTIL_DONE, **HERE).refine(case.weight, stats, case.mask, case.pattern)
    assert torch.equal(refined.mask, case.pattern.top(score, 2))


@quick
@given(cases(), targets)
def test_without_drift_all_targets_are_one(case, target):
    """Where inputs and residual stream are those of the dense model, nothing but the inputs at hand counts."""
    stats = stats_of(case.x, case.x, torch.zeros_like(case.behind))
    one = Swaps(**target).refine(case.weight, stats, case.mask, case.pattern)
    assert torch.equal(one.mask, Swaps(**HERE).refine(case.weight, stats, case.mask, case.pattern).mask)


@quick
@given(cases(), targets)
def test_layers_off_the_residual_stream(case, target):
    """A layer that does not write into the residual stream aims at its own outputs alone."""
    stats = stats_of(case.x, case.y)
    one = Swaps(**target).refine(case.weight, stats, case.mask, case.pattern)
    other = Swaps(**{**target, "residual_weight": 0}).refine(case.weight, stats, case.mask, case.pattern)
    assert torch.equal(one.mask, other.mask)


def test_nothing_to_gain_changes_nothing():
    """Where all inputs are zero, or all weights, every mask is as good and the initial one stays."""
    case = Case.of(3, 2, Pattern(2, 4), 0)
    dead = LayerStats(1, 8, gram=torch.zeros(8, 8))
    assert torch.equal(Swaps(**HERE).refine(case.weight, dead, case.mask, case.pattern).mask, case.mask)
    assert torch.equal(Swaps().refine(torch.zeros(3, 8), case.stats, case.mask, case.pattern).mask, case.mask)


@pytest.mark.parametrize("weak", [0.0, 1e-41, 1e-20])
def test_weak_rows_that_lag_behind(weak):
    """Rows of hardly any weight, whose residual stream lags behind all the same, spoil no figure and no other row."""
    strong = Case.of(4, 3, Pattern(2, 4), 0)
    strong = dataclasses.replace(strong, behind=1e3 * strong.behind)
    weight = torch.cat([strong.weight[:3], weak * strong.weight[3:]])
    one = dataclasses.replace(strong, weight=weight).refined(residual_weight=1.0)
    assert torch.equal(one.mask[:3], strong.refined(residual_weight=1.0).mask[:3])
    assert all(np.isfinite(value) for value in one.figures.values())


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(8, 16)], ids=str)
def test_correlated_inputs_beat_wanda(pattern):
    """On correlated inputs the error of Wanda's mask falls by a tenth and more."""
    case = Case.of(32, 96 // pattern.group, pattern, 0)
    mask = pattern.top(Wanda().score(case.weight, case.stats))
    pruned = Swaps(**HERE).refine(case.weight, case.stats, mask, pattern)
    assert case.error(pruned.mask, **HERE).sum() < 0.9 * case.error(mask, **HERE).sum()


# Symmetries


@quick
@given(cases(), seeds, targets)
def test_rows_do_not_see_each_other(case, seed, target):
    """Rows in another order, or some of them alone, get the same masks."""
    order = torch.randperm(len(case.weight), generator=torch.Generator().manual_seed(seed))
    order = order[: 1 + seed % len(order)]
    part = Case(case.weight[order], case.x, case.y, case.behind[:, order], case.mask[order], case.pattern)
    assert torch.equal(part.refined(**target).mask, case.refined(**target).mask[order])


@quick
@given(cases(), st.integers(-60, 60), st.integers(-30, 30))
def test_scales_do_not_matter(case, rows, inputs):
    """Weights, inputs and the stream, multiplied by powers of two that go together, get the same mask."""
    weight, behind = case.weight * 2.0**rows, case.behind * 2.0 ** (rows + inputs)
    scaled = Case(weight, case.x * 2.0**inputs, case.y * 2.0**inputs, behind, case.mask, case.pattern)
    target = {"dense_weight": 0.5, "residual_weight": 0.25}
    assert torch.equal(scaled.refined(**target).mask, case.refined(**target).mask)


@quick
@given(cases(), st.integers(1, 80))
def test_block_size_does_not_matter(case, columns):
    """A sweep in blocks of any width chooses the same masks as one block of everything."""
    stats = case.stats
    problem = Problem.of(case.weight, stats.gram, stats.drift, stats.lag, case.pattern)
    dropped = (~case.mask).t().float().contiguous()
    assert torch.equal(sweep(problem, dropped, columns), sweep(problem, dropped, 10_000))


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(8, 16)], ids=str)
def test_rows_in_parts(pattern):
    """Rows that are swept a few at a time, for want of memory, get the same masks."""
    case = Case.of(7, 2, pattern, 3)
    stats, dropped = case.stats, (~case.mask).t().float().contiguous()
    problem = Problem.of(case.weight, stats.gram, stats.drift, stats.lag, pattern)
    whole, _ = descend(problem, dropped, UNTIL_DONE)
    parts, _ = descend(problem, dropped, UNTIL_DONE, most_pairs=3 * pattern.group**2)
    assert torch.equal(parts, whole) and not torch.equal(whole, dropped)


# Options


@pytest.mark.parametrize(
    "options",
    [
        {"sweeps": 0},
        {"skip_tokens": -1},
        *({name: w} for name in ("dense_weight", "residual_weight") for w in (-1, 1.1)),
    ],
)
def test_impossible_options(options):
    """No sweep at all, fewer than no tokens, and a target beyond both ends, are refused."""
    with pytest.raises(NMBenchError, match="swaps needs sweeps >= 1, dense_weight and residual_weight from 0 to 1"):
        Swaps(**options)


def test_needs_depend_on_the_target():
    """The dense model is walked along, and its residual stream looked at, only where it is aimed at."""
    assert Swaps(**HERE).needs == Stat.GRAM
    assert Swaps(dense_weight=0.1, residual_weight=0.0).needs == Stat.GRAM | Stat.DRIFT
    assert Swaps(dense_weight=0.0, residual_weight=0.1).needs == Stat.GRAM | Stat.DRIFT | Stat.LAG
