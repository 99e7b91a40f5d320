"""The sweep of SparseGPT over blocks of columns, and over the columns of a block by a plain loop.

In the paper, column c is given the error e_c = (w_c - q_c) / U_cc, where w is the weight as updated by then and q what
is kept of it, and every column to its right moves by -e_c times row c of U. All errors E and the whole change D = W - Q
of a row are therefore tied by D = E U, which is E = D R with R = U^-1. Let P be the columns of all blocks before block
B. Their errors move B by -E_P U_PB, and U_PB = -R_PP^-1 R_PB U_BB by the inversion of a triangular matrix in blocks, so

    w_B at the beginning of B  =  W_B + (D_P R_PB) U_BB,

an exact rewriting of the paper's updates: only blocks U_BB on the diagonal of R^-1 are needed. `pull` below sums up
D_P R_P,: for all columns that are to come, one matrix product per block. Inside a block the paper is followed, with
1 / U_cc = R_cc. `sweep_block` is the slow twin of `kernel.sweep_block`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import nmbench
from nmbench_plugins.sparsegpt.factor import inverses

BlockSweep = Callable[[Tensor, Tensor, Tensor, Tensor, nmbench.Pattern], None]


def sweep_block(weight: Tensor, mask: Tensor, spread: Tensor, pivots: Tensor, pattern: nmbench.Pattern) -> None:
    """Prune one block of columns in place: `weight` `[out, columns]`, and `mask`, bool, which is written.

    `spread`: U_BB `[columns, columns]`; `pivots`: the diagonal of R_BB `[columns]`. Groups are chosen by |w| R_cc, the
    root of the paper's score w^2 / U_cc^2. Raises `NumericalFailure` if one is not finite.
    """
    for column in range(weight.shape[1]):
        if column % pattern.group == 0:
            group = slice(column, column + pattern.group)
            mask[:, group] = pattern.top(weight[:, group].abs() * pivots[group])
        kept = weight[:, column].masked_fill(~mask[:, column], 0.0)
        error = (weight[:, column] - kept) * pivots[column]
        weight[:, column] = kept
        weight[:, column + 1 :] -= torch.outer(error, spread[column, column + 1 :])


def sweep(
    weight: Tensor,
    root: Tensor,
    pattern: nmbench.Pattern,
    block_columns: int,
    sweep_block: BlockSweep = sweep_block,
) -> tuple[Tensor, Tensor]:
    """Prune `weight` `[out, in]` from left to right; return the mask and the repaired weight.

    `root`: R `[in, in]` of `factor`, of the dtype of the weight, which stays as it is. Raises `NMBenchError` if rows do
    not fall into groups and `NumericalFailure` if a score or a repaired weight is not finite.
    """
    pattern.groups(weight)
    columns = weight.shape[1]
    width = block_width(pattern, block_columns, columns)
    spreads, pivots = inverses(root, width), root.diagonal().contiguous()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    repaired, pull = torch.empty_like(weight), torch.zeros_like(weight)
    for spread, start in zip(spreads, range(0, columns, width), strict=True):
        stop = min(start + width, columns)
        block, inside = slice(start, stop), slice(0, stop - start)
        spread = spread[inside, inside]
        torch.addmm(weight[:, block], pull[:, block], spread, out=repaired[:, block])
        sweep_block(repaired[:, block], mask[:, block], spread, pivots[block], pattern)
        pull[:, stop:].addmm_(weight[:, block] - repaired[:, block], root[block, stop:])
    if not repaired.isfinite().all():
        row, column = repaired.isfinite().logical_not().nonzero()[0].tolist()
        raise nmbench.NumericalFailure(f"the repaired weight at ({row}, {column}) is {repaired[row, column].item()}.")
    return mask, repaired


def block_width(pattern: nmbench.Pattern, block_columns: int, columns: int) -> int:
    """How many columns a block has: whole groups, at most `block_columns` if that is one group or more."""
    return min(max(block_columns // pattern.group, 1) * pattern.group, columns)
