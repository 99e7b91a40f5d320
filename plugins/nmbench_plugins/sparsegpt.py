"""SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (Frantar and Alistarh, arXiv 2301.00774).

With H = (2/windows) * sum X^T X, damped, and U the upper Cholesky factor of H^-1, the columns are swept from left to
right. At the first column of each group the mask is chosen from the already updated weights by the score w^2 / U_cc^2;
each column's pruning error (w - q) / U_cc is then spread over the columns to its right by the row U_c. Columns are
swept in blocks, so that the update of all later columns is one matrix product per block (paper, algorithm 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import nmbench

HIGHEST_DAMPING = 1.0


@dataclass(frozen=True)
class SparseGPT(nmbench.Solver):
    """Prune column by column and repair the remaining weights with second-order information (arithmetic in float32)."""

    needs = nmbench.Stat.GRAM

    damping: float = nmbench.option(0.01, "added to the diagonal of the Hessian, relative to its mean")
    block_columns: int = nmbench.option(128, "columns swept before later ones are updated at once", unit="columns")
    sequential: bool = nmbench.option(
        False, "true-sequential: look at the inputs of a layer when the layers before it in its block are pruned"
    )

    def __post_init__(self) -> None:
        if self.damping < 0 or self.block_columns < 1:
            raise nmbench.NMBenchError("sparsegpt needs damping >= 0 and block_columns >= 1.")

    def solve(self, weight: Tensor, stats: nmbench.LayerStats, pattern: nmbench.Pattern) -> nmbench.Pruned:
        assert stats.gram is not None
        work, hessian = weight.float(), stats.gram.clone()
        dead = hessian.diagonal() == 0
        hessian.diagonal()[dead] = 1.0
        work = work.masked_fill(dead, 0.0)
        factor, damping = inverse_factor(hessian, self.damping)
        mask, repaired = sweep(work, factor, pattern, self.block_columns)
        note = f"damping raised from {self.damping:g} to {damping:g}" if damping != self.damping else ""
        return nmbench.Pruned(mask, repaired.to(weight.dtype), note)


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """The upper Cholesky factor of the damped inverse, `[in, in]`, and the damping that it took.

    Damping is raised tenfold while the factorisation fails. Raises `NumericalFailure` beyond `HIGHEST_DAMPING`.
    """
    mean = hessian.diagonal().mean()
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    while True:
        factor = cholesky_of_inverse(hessian + damping * mean * eye)
        if factor is not None:
            return factor, damping
        if damping >= HIGHEST_DAMPING:
            raise nmbench.NumericalFailure(f"the Hessian has no Cholesky factor even with damping {damping:g}.")
        damping = min(max(10 * damping, 0.01), HIGHEST_DAMPING)


def cholesky_of_inverse(matrix: Tensor) -> Tensor | None:
    """U with U^T U = matrix^-1, upper triangular, or None if the matrix is not positive definite in float32."""
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return upper if not failed and upper.isfinite().all() else None


def sweep(weight: Tensor, factor: Tensor, pattern: nmbench.Pattern, block_columns: int) -> tuple[Tensor, Tensor]:
    """Prune `weight` `[out, in]` float32 from left to right; return the mask and the repaired weight."""
    weight = weight.clone()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    width = max(block_columns // pattern.group, 1) * pattern.group  # whole groups only
    for start in range(0, weight.shape[1], width):
        stop = min(start + width, weight.shape[1])
        block = slice(start, stop)
        errors = sweep_block(weight[:, block], mask[:, block], factor[block, block], pattern)
        weight[:, stop:] -= errors @ factor[block, stop:]
    return mask, weight


def sweep_block(weight: Tensor, mask: Tensor, factor: Tensor, pattern: nmbench.Pattern) -> Tensor:
    """Prune one block of columns in place; return its scaled errors `[out, columns]`."""
    errors = torch.zeros_like(weight)
    diagonal = factor.diagonal()
    for column in range(weight.shape[1]):
        if column % pattern.group == 0:
            group = slice(column, column + pattern.group)
            mask[:, group] = pattern.top(weight[:, group].square() / diagonal[group].square())
        kept = weight[:, column].masked_fill(~mask[:, column], 0.0)
        errors[:, column] = (weight[:, column] - kept) / diagonal[column]
        weight[:, column] = kept
        weight[:, column + 1 :] -= torch.outer(errors[:, column], factor[column, column + 1 :])
    return errors


@nmbench.hookimpl
def nmbench_register_baselines(register: nmbench.Register) -> None:
    register("sparsegpt", SparseGPT)
