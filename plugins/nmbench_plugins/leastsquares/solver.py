"""The optimal kept weights of one layer under a mask of any support.

With the notation of `nmbench.pruning.conjugate_gradients`, the kept weights w_k of a row minimise f(w) + d |w - w_0|^2,
which gives the normal equations of the row

    (H_kk + d I) (w - w_0)_k  =  (c - w_0 H)_k.

Every row keeps other inputs and has a matrix H_kk of its own: one Cholesky factorisation of k^3 / 3 operations a row,
many rows in one call. Where that is too dear, conjugate gradients descend on all rows together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import nmbench
from nmbench.pruning import better_rows, conjugate_gradients

MOST_BYTES = 2**28  # of the matrices H_kk that are factorised together
MOST_OPERATIONS = 1e12  # of the factorisations of a layer; more are replaced by conjugate gradients
REFINEMENTS = 2  # of a solution in float32
FIRST_DAMPING, HIGHEST_DAMPING = 1e-6, 1.0


class Solution(NamedTuple):
    """The kept weights `[out, in]`, and the damping used, which is above the one asked for where a factor failed."""

    weight: Tensor
    damping: float


def solved(
    start: Tensor,
    mask: Tensor,
    gram: Tensor,
    linear: Tensor,
    damping: float = 0.0,
    iterations: int = 100,
    tolerance: float = 1e-5,
    most_operations: float = MOST_OPERATIONS,
) -> Solution:
    """Return the exact solution if it takes at most `most_operations`, else that of conjugate gradients.

    `start` `[out, in]`, bool `mask` `[out, in]`, `gram` H `[in, in]` and `linear` c `[out, in]`; float32 or float64.
    `iterations` and `tolerance` are those of `nmbench.pruning.conjugate_gradients`. Raises `NumericalFailure` as
    `exact`.
    """
    if operations(mask) <= most_operations:
        return exact(start, mask, gram, linear, damping)
    return Solution(conjugate_gradients(start, mask, gram, linear, iterations, tolerance, damping), damping)


def operations(mask: Tensor) -> float:
    """Return the floating-point operations of the factorisations of `exact`."""
    return float(mask.sum(dim=1).double().pow(3).sum() / 3)


def exact(
    start: Tensor,
    mask: Tensor,
    gram: Tensor,
    linear: Tensor,
    damping: float = 0.0,
    precision: torch.dtype | None = None,
    most_bytes: int = MOST_BYTES,
) -> Solution:
    """Return the solution of the normal equations of every row, zero where bool `mask` `[out, in]` is False.

    Arguments as for `solved`; the result has the dtype of `start`. A weight on a dead input keeps its start. Factors
    are in `precision`, by default float64 on a CPU and else float32, refined; at most `most_bytes` of matrices at once.
    Damping is raised tenfold for rows without a factor. No row has a higher error than its start. Raises
    `NumericalFailure` if there is no factor up to `HIGHEST_DAMPING`.
    """
    start = start.where(mask, 0.0)
    precision = precision or (torch.float64 if start.device.type == "cpu" else start.dtype)
    solvable = mask & (gram.diagonal() > 0)
    pull = (linear - start @ gram).to(precision)
    sums, found, used = gram.to(precision), start.clone(), damping
    width = int(solvable.sum(dim=1).amax())
    rows = max(most_bytes // max(width**2 * sums.element_size(), 1), 1)
    for part in torch.arange(len(start), device=start.device).split(rows if width else len(start)):
        change, needed = changes(solvable[part], sums, pull[part], damping)
        found[part] += change.to(start.dtype)
        used = max(used, needed)
    return Solution(better_rows(start, found, gram, linear) + 0.0, used)


def changes(mask: Tensor, gram: Tensor, pull: Tensor, damping: float) -> tuple[Tensor, float]:
    """Return (w - w_0) `[rows, in]` for `pull`, c - w_0 H `[rows, in]`, and the damping that was needed."""
    places, real = kept_columns(mask)
    matrices = gram[places[:, :, None], places[:, None, :]]  # [rows, k, k]
    matrices = matrices.where(real[:, :, None] & real[:, None, :], 0.0)
    side = pull.gather(1, places).where(real, 0.0)
    mean = gram.diagonal().mean()
    while True:
        diagonal = (matrices.diagonal(dim1=1, dim2=2) + damping * mean).where(real, 1.0)
        found = refined(matrices.diagonal_scatter(diagonal, dim1=1, dim2=2), side)
        if found is not None:
            break
        if damping >= HIGHEST_DAMPING:
            raise nmbench.NumericalFailure(f"the kept inputs have no Cholesky factor even with damping {damping:g}.")
        damping = min(max(10 * damping, FIRST_DAMPING), HIGHEST_DAMPING)
    return torch.zeros_like(pull).scatter_add_(1, places, found), damping


def kept_columns(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns that bool `mask` `[rows, in]` keeps, int64 `[rows, k]`, and whether an entry is one of them.

    A row with fewer columns than the longest is filled up with others.
    """
    counts = mask.sum(dim=1, keepdim=True)
    width = int(counts.amax())
    places = mask.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :width]
    return places, torch.arange(width, device=mask.device) < counts


def refined(matrices: Tensor, side: Tensor) -> Tensor | None:
    """Return the solutions `[rows, k]` of `matrices` `[rows, k, k]` for `side` `[rows, k]`; None without a factor."""
    factors, failed = torch.linalg.cholesky_ex(matrices)
    if failed.any():
        return None
    found = torch.cholesky_solve(side[:, :, None], factors)
    for _ in range(REFINEMENTS if side.dtype is not torch.float64 else 0):
        found += torch.cholesky_solve(side[:, :, None] - matrices @ found, factors)
    return found[:, :, 0] if found.isfinite().all() else None
