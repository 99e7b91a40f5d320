"""Laws of ALPS (arXiv 2406.07831), and equality of its search with the plain formulas of the paper."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmbench.errors import NMBenchError, NumericalFailure
from nmbench.methods import LayerStats, Stat
from nmbench.pattern import Pattern
from nmbench.pruning.one_shot import choose
from nmbench.testing import strategies
from nmbench_plugins.alps import ALPS, admm
from nmbench_plugins.alps.penalty import Step, next_step
from nmbench_plugins.alps.problem import Problem
from nmbench_plugins.sparsegpt import SparseGPT
from nmbench_plugins.wanda import Wanda
from reference import alps as plain

quick = settings(max_examples=20, deadline=None)
PATTERNS = [Pattern(*pair) for pair in ((1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 3), (3, 10))]
PATTERNS += map(Pattern.parse, ("2:4x2", "1:3x3"))
patterns, seeds = st.sampled_from(PATTERNS), st.integers(0, 2**31)


def layer(rows: int, columns: int, seed: int) -> tuple[Tensor, LayerStats]:
    """A weight and the statistics of correlated inputs of different size."""
    weight, mixing = strategies.values("normal", (rows, columns), seed), strategies.values("normal", (columns,) * 2, 1)
    x = strategies.values("normal", (4 * columns, columns), seed + 1)
    x = (x + 0.2 * x @ mixing) * strategies.values("normal", (columns,), seed + 2).exp()
    return weight, strategies.statistics(x, 4)


def error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """The squared change of the layer's outputs, in float64."""
    change = (pruned - weight).double()
    return float((change * (change @ gram.double())).sum())


# What comes back


@quick
@given(st.data())
def test_solution_is_strict(data):
    """The mask keeps exactly N of every M, the weight is zero off the mask, no zero is negative, arguments stay."""
    pattern = data.draw(patterns)
    weight, stats = data.draw(strategies.layers(pattern, ("normal", "ties", "one outlier", "signed zeros", "huge")))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    before = weight.clone(), stats.gram.clone()
    pruned = ALPS().solve(weight.to(dtype), stats, pattern)
    assert not pattern.broken(pruned.mask).any()
    assert pruned.weight.dtype == dtype
    assert pruned.weight.isfinite().all()
    assert not pruned.weight[~pruned.mask].any()
    assert not ((pruned.weight == 0) & pruned.weight.signbit()).any()
    assert pruned.note == ""
    assert all(map(torch.equal, before, (weight, stats.gram)))


@quick
@given(patterns, st.integers(1, 5), st.integers(1, 6), seeds, st.sampled_from([0.1, 2.0, 20.0]))
def test_search_is_that_of_the_paper(pattern, rows, groups, seed, penalty):
    """One matrix and a mask as the state, and Cholesky factors, do what the paper's B, D and V do, in float64."""
    agree(pattern, rows, groups * pattern.group, seed, penalty)


@pytest.mark.parametrize("penalty", [50.0, 300.0])
def test_search_begins_again_as_in_the_paper(penalty):
    """A first penalty that is too high is lowered, and the search begins again, at the same iterations."""
    with pytest.MonkeyPatch.context() as patched:
        steps: list[Step] = []
        patched.setattr(admm, "next_step", lambda *given: steps.append(next_step(*given)) or steps[-1])
        agree(Pattern(2, 4), 40, 64, 0, penalty)
    assert any(step.restart for step in steps)
    assert steps[0].penalty == penalty / 5


def agree(pattern: Pattern, rows: int, columns: int, seed: int, penalty: float) -> None:
    """Assert that the search and the plain loop end after the same iterations with the same mask and weights."""
    weight, stats = layer(rows, columns, seed)
    single = Problem.of(weight, stats.gram, 0.01)
    gram = single.gram.double()
    problem = Problem(single.dense.double(), (gram + gram.T) / 2, single.scale.double())
    found = admm.search(problem, pattern, penalty, 60)
    largest = plain.largest(pattern.keep, pattern.group, pattern.unit)
    mask, expected, iterations = plain.search(problem.dense.T, problem.gram, largest, pattern.density, penalty, 60)
    assert found.iterations == iterations
    assert torch.equal(found.mask, mask.T)
    torch.testing.assert_close(found.weight, expected.T, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(4, 8), Pattern(1, 4)], ids=str)
def test_solver_is_the_plain_loop(pattern):
    """The whole solver in float32 leaves the error of the plain loop in float64, and nearly its mask."""
    weight, stats = layer(24, 64, 0)
    pruned = ALPS().solve(weight, stats, pattern)
    largest = plain.largest(pattern.keep, pattern.group)
    mask, expected = plain.solve(weight.double(), stats.gram.double(), largest, pattern.density)
    assert (pruned.mask == mask).float().mean() > 0.995
    assert error(weight, pruned.weight, stats.gram) == pytest.approx(error(weight, expected, stats.gram), rel=1e-3)


@quick
@given(st.data())
def test_first_mask_is_that_of_wanda(data):
    """Without damping, the search starts from Wanda's mask."""
    pattern = data.draw(patterns)
    weight, stats = data.draw(strategies.layers(pattern, ("normal",)))
    units, scores = pattern.units, pattern.unit_scores(Wanda().score(weight, stats), 2).sqrt()
    score = units.groups(scores).sort(dim=-1, descending=True).values
    assume((score[..., units.keep - 1] > score[..., units.keep] * 1.0001 + 1e-6).all())
    first = admm.nearest(Problem.of(weight, stats.gram, 0.0).dense, pattern)
    assert torch.equal(first, choose(Wanda(), weight, stats, pattern).mask)


# How good it is


@quick
@given(patterns, seeds)
def test_repair_lowers_the_error(pattern, seed):
    """Conjugate gradients keep the mask, and their error is not above that of the search."""
    weight, stats = layer(8, 4 * pattern.group, seed)
    damped = stats.gram + 0.01 * stats.gram.diagonal().mean() * torch.eye(len(stats.gram))
    before, after = (ALPS(repair_steps=steps).solve(weight, stats, pattern) for steps in (0, 10))
    assert torch.equal(before.mask, after.mask)
    assert error(weight, after.weight, damped) <= error(weight, before.weight, damped) * (1 + 1e-5)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(4, 8), Pattern(1, 4)], ids=str)
def test_error_is_below_that_of_sparsegpt(pattern):
    """On correlated inputs, ALPS leaves a lower layer error than SparseGPT, and by much on the whole."""
    cases = [layer(32, 64, 10 * seed) for seed in range(8)]
    errors = [
        [error(weight, method.solve(weight, stats, pattern).weight, stats.gram) for method in (ALPS(), SparseGPT())]
        for weight, stats in cases
    ]
    assert sum(ours < theirs for ours, theirs in errors) >= 7
    assert sum(ours / theirs for ours, theirs in errors) < 0.9 * len(errors)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_aim_at_the_dense_model(share):
    """With a target towards the dense model's outputs, the outputs come closer to that target than without."""
    x, noise = strategies.values("normal", (256, 32), 0), strategies.values("normal", (256, 32), 1)
    x[:, 1:] += 0.7 * x[:, :-1]
    y, weight = x + 0.3 * noise + 0.3 * x.roll(1, 1), strategies.values("normal", (16, 32), 2)
    stats = replace(strategies.statistics(x, 2), drift=(y - x).T @ x)
    target = (x + share * (y - x)) @ weight.T
    weights = [ALPS(dense_weight=aim).solve(weight, stats, Pattern(2, 4)).weight for aim in (share, 0.0)]
    errors = [float((x @ pruned.T - target).square().sum()) for pruned in weights]
    assert errors[0] < 0.9 * errors[1]
    goal = Problem.of(weight, stats.gram, 0.0, share * stats.drift).goal() / Problem.of(weight, stats.gram, 0.0).scale
    expected = torch.linalg.lstsq(x.double(), target.double()).solution.T
    torch.testing.assert_close(goal, expected.float(), rtol=1e-3, atol=1e-3)


def test_drift_is_needed_for_that_aim_only():
    """Without an aim at the dense model, no second pass through the dense model is asked for."""
    assert ALPS().needs is Stat.GRAM
    assert ALPS(dense_weight=0.5).needs == Stat.GRAM | Stat.DRIFT


# Inputs that are hard


def test_dead_inputs_are_dropped_first():
    """A weight on an input that is always zero is dropped where enough others are not, and no note is needed."""
    weight, stats = layer(16, 32, 0)
    stats.gram[::2], stats.gram[:, ::2] = 0.0, 0.0
    pruned = ALPS().solve(weight, stats, Pattern(2, 4))
    assert not pruned.mask[:, ::2].any()
    assert pruned.note == ""
    nothing = ALPS().solve(weight, LayerStats(1, 1, gram=torch.zeros(32, 32)), Pattern(2, 4))
    assert nothing.weight.isfinite().all()


def test_damping_is_raised_where_there_is_no_factor():
    """A Gram matrix with a negative eigenvalue gets more damping, and the note says so."""
    weight, stats = layer(4, 16, 0)
    gram = stats.gram - 0.3 * stats.gram.diagonal().amin() * torch.eye(16)
    gram[0, 1] = gram[1, 0] = 1.3 * (gram[0, 0] * gram[1, 1]).sqrt()
    pruned = ALPS().solve(weight, LayerStats(1, 1, gram=gram), Pattern(2, 4))
    assert pruned.note.startswith("damping raised from 0.01 to ")
    assert (Pattern(2, 4).kept(pruned.mask) == 2).all()


def test_no_factor_is_a_failure():
    """A Gram matrix that no damping makes definite raises `NumericalFailure`; no other method takes over."""
    gram = torch.full((16, 16), 50.0).fill_diagonal_(1.0)
    with pytest.raises(NumericalFailure, match="no Cholesky factor even with damping 1"):
        ALPS().solve(torch.randn(4, 16), LayerStats(1, 1, gram=gram), Pattern(2, 4))


# The penalty and the options


@pytest.mark.parametrize(
    ("raised", "change", "iterations", "expected"),
    [
        (False, 0.2, 3, (1.3, True, False, False)),
        (True, 0.1, 3, (1.2, True, False, False)),
        (True, 0.004, 3, (1.1, True, False, False)),
        (False, 0.004, 3, (0.2, False, True, False)),
        (False, 0.0, 3, (0.2, False, False, False)),
        (True, 0.0, 3, (1.0, True, False, True)),
        (True, 0.0002, 30, (1.1, True, False, False)),
        (True, 0.0002, 33, (1.0, True, False, True)),
    ],
)
def test_penalty_follows_the_change_of_the_mask(raised, change, iterations, expected):
    """The penalty rises by the share of changed weights, falls while it never rose, and the end is a settled mask."""
    assert next_step(1.0, raised, change, iterations) == pytest.approx(expected)
    assert next_step(1e6, True, 0.2, 3).penalty == 1e6


@pytest.mark.parametrize("options", [{"damping": -1.0}, {"penalty": 0.0}, {"iterations": 0}, {"repair_steps": -1}])
def test_impossible_options_are_refused(options):
    """A negative damping, no penalty, no iteration and a negative number of steps are errors that name the limits."""
    with pytest.raises(NMBenchError, match="alps needs damping >= 0"):
        ALPS(**options)
    with pytest.raises(NMBenchError, match="dense_weight from 0 to 1"):
        ALPS(dense_weight=-0.5)
