"""The search for the mask by the alternating direction method of multipliers (ADMM).

For the problem of a layer with the matrix H, its goal B0 (in the paper, the dense weights) and a penalty rho, the paper
(arXiv 2406.07831) alternates

    B = (H + rho I)^-1 (H B0 - V + rho D),    D = projection of B + V / rho,    V += rho (B - D),

where the projection keeps the N largest of every M entries along the input; of units, those with the largest sums of
squares. With Z = B + V / rho, D is the kept part of
Z, and V is rho times the dropped part, so that Z and the mask are the whole state. With S = Z where kept and -Z where
dropped, H B0 - V + rho D = H B0 + rho S, and (H + rho I)^-1 H = I - rho (H + rho I)^-1, which gives

    B = B0 + rho (S - B0) (H + rho I)^-1,    Z = B + dropped part of Z

for rows: one matrix product an iteration. When rho changes to rho', V must not: the dropped part of Z is multiplied by
rho / rho'. The inverse changes at every third iteration only. The twin in the tests has the paper's formulas.

The product is a small correction of B0 and loses nothing by cancellation, and only the mask of the search matters: the
weights are repaired later. So the products of the search are in TF32 where a GPU has it, all else in full float32. In
the paper's form, H B0 - V is large and its image under the inverse nearly B0 + V / rho: TF32 there changes the mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import nmbench
from nmbench.calibration import tf32
from nmbench_plugins.alps.penalty import EVERY, next_step
from nmbench_plugins.alps.problem import Problem


class Found(NamedTuple):
    """The strict `mask` bool `[out, in]`, the scaled `weight` `[out, in]` on it, and the number of iterations."""

    mask: Tensor
    weight: Tensor
    iterations: int


def search(problem: Problem, pattern: nmbench.Pattern, penalty: float, most_iterations: int) -> Found | None:
    """Return the mask of the problem and weights on it; None if a matrix H + rho I has no Cholesky factor.

    Raises `NumericalFailure` if a weight is not finite, and `NMBenchError` if rows cannot be split into groups.
    """
    dense = problem.goal()
    if dense is None:
        return None
    with tf32():
        return searched(problem, dense, pattern, penalty, most_iterations)


def searched(
    problem: Problem, dense: Tensor, pattern: nmbench.Pattern, penalty: float, most_iterations: int
) -> Found | None:
    """Return the result of `search` from the goal `dense` `[out, in]`."""
    first = mask = nearest(dense, pattern)
    seen, state, raised, iterations = first, dense.where(first, 0.0), False, 0
    while True:
        inverse = problem.inverse(penalty)
        if inverse is None:
            return None
        rounds = min(EVERY, most_iterations - iterations)
        for left in reversed(range(rounds)):
            weight, state = iterated(dense, state, mask, inverse, penalty)
            mask = nearest(state, pattern, checked=not left)  # NaN stays until then
        iterations += rounds
        del inverse  # as large as the next one
        change = int((mask != seen).sum()) / (dense.numel() * pattern.density)
        step = next_step(penalty, raised, change, iterations)
        if step.done or iterations == most_iterations:
            break
        seen = mask  # also before a new search, as in the paper's code
        if step.restart:
            mask, state = first, dense.where(first, 0.0)
        else:
            state = state.where(mask, state * (penalty / step.penalty))
        penalty, raised = step.penalty, step.raised
    mask = nearest(weight, pattern)
    return Found(mask, weight.where(mask, 0.0), iterations)


def nearest(weight: Tensor, pattern: nmbench.Pattern, checked: bool = True) -> Tensor:
    """Return the bool mask of the projection of `weight` `[out, in]`.

    Raises `NumericalFailure` for NaN and infinity if `checked`.
    """
    return (pattern.top if checked else pattern.top_of_finite)(weight.abs(), unit_power=2)


def iterated(dense: Tensor, state: Tensor, mask: Tensor, inverse: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Return B and the next Z, both `[out, in]`, of one iteration; `state`, Z `[out, in]`, is overwritten.

    `mask` is that of Z, and `inverse` is (H + rho I)^-1 `[in, in]`.
    """
    dropped = state.masked_fill(mask, 0.0)
    target = state.sub_(dropped, alpha=2).sub_(dense)  # S - B0; Z - 2 Z is -Z without rounding
    weight = torch.addmm(dense, target, inverse, alpha=penalty)
    return weight, dropped.add_(weight)
