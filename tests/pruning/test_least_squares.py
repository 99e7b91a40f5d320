"""Laws of the descent of kept weights by conjugate gradients (`nmbench.pruning.conjugate_gradients`)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmbench.pattern import Pattern
from nmbench.pruning import better_rows, conjugate_gradients
from nmbench.testing import strategies

quick = settings(max_examples=24, deadline=None)
KINDS = ("normal", "ties", "one outlier", "huge", "signed zeros", "subnormal")


def problem(data: st.DataObject, kinds: tuple[str, ...] = ("normal",)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight, a mask of any support, the Gram matrix of few or dead inputs, and a target's linear term."""
    weight = data.draw(strategies.tensors(Pattern(2, 4), kinds))
    gram = data.draw(strategies.grams(weight.shape[1]))
    mask = strategies.values("normal", tuple(weight.shape), data.draw(st.integers(0, 2**31))) > 0
    if data.draw(st.booleans()):
        return weight, mask, gram, weight @ gram
    dense = weight + strategies.values("normal", tuple(weight.shape), 1) * weight.abs().amax()
    return weight, mask, gram, dense @ gram


def error(weight: Tensor, gram: Tensor, linear: Tensor) -> Tensor:
    """w H w^T - 2 c w^T of every row, in float64."""
    weight, gram, linear = weight.double(), gram.double(), linear.double()
    return (weight * (weight @ gram - 2 * linear)).sum(dim=1)


@pytest.mark.parametrize("size", [1.0, 2.0**-60])
def test_directions_without_curvature_are_not_taken(size):
    """With the inputs of one token, all but one direction are flat: rounding alone would send the weights far away."""
    token = strategies.values("normal", (1, 64), 3)
    start, gram = size * strategies.values("normal", (32, 64), 4), token.t() @ token
    kept = strategies.values("normal", (32, 64), 5) > 0
    found = conjugate_gradients(start, kept, gram, start @ gram, iterations=40, tolerance=0.0)
    assert found.abs().amax() < 100 * start.abs().amax()


@quick
@given(st.data(), st.sampled_from([0.0, 0.01]), st.integers(0, 40))
def test_error_never_rises(data, damping, iterations):
    """No row ends with a higher error than it began with, whatever the steps, the damping, the mask and the inputs."""
    weight, mask, gram, linear = problem(data, KINDS)
    found = conjugate_gradients(weight, mask, gram, linear, iterations, damping=damping)
    start = weight.where(mask, 0.0)
    reach = (weight.double().abs().amax(dim=1) + linear.double().abs().amax(dim=1)).square() * gram.double().amax()
    assert found.isfinite().all()
    assert (error(found, gram, linear) <= error(start, gram, linear) + 1e-6 * reach).all()


@quick
@given(st.data())
def test_only_kept_weights_change(data):
    """Dropped weights are zero, no zero is negative, the arguments are unchanged, and no steps return the start."""
    case = problem(data, KINDS)
    before = [tensor.clone() for tensor in case]
    found, same = conjugate_gradients(*case), conjugate_gradients(*case, iterations=0)
    weight, mask = case[:2]
    assert not found[~mask].any()
    assert not (found == 0).logical_and(found.signbit()).any()
    assert torch.equal(same, weight.where(mask, 0.0))
    assert all(map(torch.equal, before, case))


@quick
@given(st.data(), st.sampled_from([0.0, 0.1]))
def test_enough_steps_solve_the_normal_equations(data, damping):
    """In float64, as many steps as there are inputs reach the solution of the normal equations of every row."""
    weight = data.draw(strategies.tensors(Pattern(2, 4), ("normal",))).double()
    inputs = strategies.values("normal", (4 * weight.shape[1], weight.shape[1]), data.draw(st.integers(0, 2**31)))
    gram = inputs.double().T @ inputs.double()
    mask = strategies.values("normal", tuple(weight.shape), 3) > -0.5
    linear = (weight + strategies.values("normal", tuple(weight.shape), 4)) @ gram
    found = conjugate_gradients(weight, mask, gram, linear, 3 * weight.shape[1], 0.0, damping)
    shift = damping * gram.diagonal().mean()
    for row, kept in enumerate(mask):
        matrix = gram[kept][:, kept] + shift * torch.eye(int(kept.sum()))
        expected = torch.linalg.solve(matrix, linear[row, kept] + shift * weight[row, kept])
        torch.testing.assert_close(found[row, kept], expected, rtol=1e-6, atol=1e-8)


@quick
@given(st.data())
def test_dense_mask_keeps_the_dense_weights(data):
    """Aimed at its own outputs with nothing dropped, a weight stays what it is."""
    weight = data.draw(strategies.tensors(Pattern(2, 4), ("normal", "ties")))
    gram = data.draw(strategies.grams(weight.shape[1]))
    found = conjugate_gradients(weight, torch.ones_like(weight, dtype=torch.bool), gram, weight @ gram)
    torch.testing.assert_close(found, weight, rtol=1e-4, atol=1e-4)


def test_tolerance_ends_the_descent():
    """A loose tolerance ends earlier than a strict one, and at a higher error."""
    weight, inputs = strategies.values("normal", (4, 32), 0), strategies.values("normal", (64, 32), 1)
    gram, mask = inputs.T @ inputs, Pattern(2, 4).top(weight.abs())
    loose, strict = (conjugate_gradients(weight, mask, gram, weight @ gram, 50, t) for t in (0.5, 1e-5))
    assert error(loose, gram, weight @ gram).sum() > error(strict, gram, weight @ gram).sum()


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_better_rows_are_chosen_row_by_row(scale):
    """A row that got better is taken, one that got worse is not, whatever the size of the weights."""
    gram = torch.eye(4)
    dense = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2) * scale
    start = torch.tensor([[1.0, 2.0, 0.0, 0.0]] * 2) * scale
    found = torch.tensor([[1.0, 2.0, 1.0, 0.0], [1.0, 2.0, -1.0, 0.0]]) * scale
    assert torch.equal(better_rows(start, found, gram, dense @ gram), torch.stack([found[0], start[1]]))
