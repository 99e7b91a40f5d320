"""Laws of the exact kept weights of a layer (`nmbench_plugins.leastsquares.solver`)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmbench.errors import NumericalFailure
from nmbench.pattern import Pattern
from nmbench.pruning import conjugate_gradients
from nmbench.testing import strategies
from nmbench_plugins.leastsquares.solver import exact, operations, solved

quick = settings(max_examples=40, deadline=None)
patterns = st.sampled_from([Pattern(2, 4), Pattern(4, 8), Pattern(1, 4), Pattern(3, 5)])
seeds = st.integers(0, 2**31)


def problem(pattern: Pattern, seed: int, strict: bool, rows: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A float32 weight, a mask that is N:M or of any support, a Gram matrix, and the linear term of another target."""
    shape = rows, 4 * pattern.group
    weight, other = strategies.values("normal", shape, seed), strategies.values("normal", shape, seed + 1)
    x = strategies.values("normal", (3 * shape[1], shape[1]), seed + 2)
    x[:, 1:] += 0.7 * x[:, :-1]
    mask = pattern.top(weight.abs()) if strict else other > 0
    return weight, mask, x.T @ x, (weight + 0.5 * other) @ (x.T @ x)


def error(weight: Tensor, gram: Tensor, linear: Tensor) -> Tensor:
    """w H w^T - 2 c w^T of every row, in float64."""
    weight, gram, linear = weight.double(), gram.double(), linear.double()
    return (weight * (weight @ gram - 2 * linear)).sum(dim=1)


def by_normal_equations(start: Tensor, mask: Tensor, gram: Tensor, linear: Tensor, damping: float) -> Tensor:
    """The readable twin: one row after the other, in float64."""
    start, gram, linear = start.double(), gram.double(), linear.double()
    shift = damping * gram.diagonal().mean()
    found = torch.zeros_like(start)
    for row, kept in enumerate(mask):
        matrix = gram[kept][:, kept] + shift * torch.eye(int(kept.sum()), dtype=torch.float64)
        found[row, kept] = torch.linalg.solve(matrix, linear[row, kept] + shift * start[row, kept])
    return found


@quick
@given(patterns, seeds, st.booleans(), st.sampled_from([0.0, 0.01, 0.5]), st.sampled_from([1, 2**28]))
def test_solution_is_that_of_the_normal_equations(pattern, seed, strict, damping, most_bytes):
    """Every row solves its own normal equations, for any support, however many rows are solved together."""
    case = problem(pattern, seed, strict)
    found = exact(*case, damping, most_bytes=most_bytes)
    expected = by_normal_equations(*case, damping)
    assert found.damping == damping
    torch.testing.assert_close(found.weight, expected.float(), rtol=1e-4, atol=1e-5)


@quick
@given(patterns, seeds)
def test_float32_is_refined(pattern, seed):
    """Factors in float32, as on a GPU, reach the error of those in float64 up to a millionth."""
    weight, mask, gram, linear = problem(pattern, seed, True)
    single, double = (exact(weight, mask, gram, linear, precision=t).weight for t in (torch.float32, torch.float64))
    scale = error(double, gram, linear).abs().max()
    assert (error(single, gram, linear) - error(double, gram, linear)).abs().max() <= 1e-6 * scale


@quick
@given(st.data())
def test_no_row_gets_worse(data):
    """Whatever the inputs, no row has a higher error than its start, or than conjugate gradients reach."""
    weight = data.draw(strategies.tensors(Pattern(2, 4), ("normal", "ties", "one outlier", "signed zeros")))
    gram = data.draw(strategies.grams(weight.shape[1]))
    mask = data.draw(strategies.masks(Pattern(2, 4), 1, 1)).repeat(len(weight), weight.shape[1] // 4)
    linear = weight @ gram
    before = [tensor.clone() for tensor in (weight, mask, gram, linear)]
    found = exact(weight, mask, gram, linear, 1e-3).weight
    start, other = weight.where(mask, 0.0), conjugate_gradients(weight, mask, gram, linear, damping=1e-3)
    slack = 1e-6 * (weight.double().abs() @ gram.double().abs() * weight.double().abs()).sum(dim=1)
    assert (error(found, gram, linear) <= error(start, gram, linear) + slack).all()
    damped = [error(w, gram, linear) + shift(gram) * (w - start).double().square().sum(dim=1) for w in (found, other)]
    assert (damped[0] <= damped[1] + slack).all()
    assert not found[~mask].any()
    assert not (found == 0).logical_and(found.signbit()).any()
    assert all(map(torch.equal, before, (weight, mask, gram, linear)))


def shift(gram: Tensor) -> Tensor:
    return 1e-3 * gram.double().diagonal().mean()


@quick
@given(patterns, seeds)
def test_dense_mask_gives_the_dense_weights(pattern, seed):
    """With nothing dropped, the best weights for the dense outputs are the dense weights, from any start."""
    dense, _, gram, _ = problem(pattern, seed, True)
    start = torch.zeros_like(dense)
    found = exact(start, torch.ones_like(dense, dtype=torch.bool), gram, dense @ gram).weight
    torch.testing.assert_close(found, dense, rtol=1e-3, atol=1e-3)


def test_dead_inputs_keep_their_start():
    """Nothing is known of an input that is always zero, so that its weights stay, without any damping."""
    weight, mask, gram, _ = problem(Pattern(2, 4), 0, True)
    gram[3], gram[:, 3] = 0.0, 0.0
    found = exact(weight, mask, gram, weight @ gram)
    assert found.damping == 0
    assert torch.equal(found.weight[:, 3], weight.where(mask, 0.0)[:, 3])
    empty = exact(weight, torch.zeros_like(mask), gram, weight @ gram)
    assert not empty.weight.any()


def test_damping_is_raised_where_there_is_no_factor():
    """Fewer tokens than kept inputs leave no factor: damping is raised and returned, and no row gets worse."""
    weight = strategies.values("normal", (3, 16), 0)
    x = torch.ones(2, 16)
    mask = Pattern(2, 4).top(weight.abs())
    found = exact(weight, mask, x.T @ x, weight @ (x.T @ x))
    assert 0 < found.damping <= 1e-3
    start = weight.where(mask, 0.0)
    assert (error(found.weight, x.T @ x, weight @ (x.T @ x)) <= error(start, x.T @ x, weight @ (x.T @ x))).all()


def test_no_factor_is_a_failure():
    """A matrix that no damping makes definite raises `NumericalFailure`; the start is not returned as a solution."""
    weight, mask, gram, linear = problem(Pattern(2, 4), 0, True)
    with pytest.raises(NumericalFailure, match="no Cholesky factor"):
        exact(weight, mask, gram + 50 * gram.max() * (1 - torch.eye(len(gram))), linear)


def test_dear_layers_are_solved_by_conjugate_gradients():
    """Above the limit of operations, conjugate gradients come close to the exact weights."""
    case = problem(Pattern(2, 4), 0, True, rows=3)
    assert operations(case[1]) == pytest.approx(3 * 8**3 / 3)
    near, best = solved(*case, most_operations=0.0).weight, solved(*case).weight
    assert torch.equal(best, exact(*case).weight)
    assert not torch.equal(near, best)
    torch.testing.assert_close(near, best, rtol=1e-2, atol=1e-2)
