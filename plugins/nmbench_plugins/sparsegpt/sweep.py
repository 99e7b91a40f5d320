"""The sweep of SparseGPT over blocks of columns.

In the paper, column c has the error e_c = (w_c - q_c) / U_cc, where w_c is the weight after the updates so far and q_c
its kept part, and every column to the right of c changes by -e_c times row c of U. All errors E and the whole change D
= W - Q of a row therefore satisfy D = E U, which is E = D R with R = U^-1. Let P be the columns of all blocks before
block B. Their errors change B by -E_P U_PB, and U_PB = -R_PP^-1 R_PB U_BB by the inversion of a triangular matrix in
blocks, so

    w_B at the beginning of B  =  W_B + (D_P R_PB) U_BB,

an exact rewriting of the paper's updates: only blocks U_BB on the diagonal of R^-1 are needed. `correction` below is
the sum of D_P R_P,: for all later columns, one matrix product per block. Inside a block, `launch.sweep_block` and
`reference.sweep_block` follow the paper, with 1 / U_cc = R_cc.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import nmbench
from nmbench_plugins.sparsegpt import reference
from nmbench_plugins.sparsegpt.factor import inverses

BlockSweep = Callable[[Tensor, Tensor, Tensor, Tensor, nmbench.Pattern], None]


def sweep(
    weight: Tensor,
    root: Tensor,
    pattern: nmbench.Pattern,
    block_columns: int,
    sweep_block: BlockSweep = reference.sweep_block,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Prune `weight` `[out, in]` from left to right; return the mask and the repaired weight.

    `root`: R `[in, in]` of `factor`, in the dtype of `weight`; `weight` does not change. `given`: a mask bool `[out,
    in]` that stays, for `reference.repair_block`. Raises `NMBenchError` if rows
    cannot be split into groups and `NumericalFailure` if a score or a repaired weight is not finite.
    """
    pattern.groups(weight)
    columns = weight.shape[1]
    width = block_width(pattern, block_columns, columns)
    spreads, pivots = inverses(root, width), root.diagonal().contiguous()
    mask = torch.zeros_like(weight, dtype=torch.bool) if given is None else given.clone()
    repaired, correction = torch.empty_like(weight), torch.zeros_like(weight)
    for spread, start in zip(spreads, range(0, columns, width), strict=True):
        stop = min(start + width, columns)
        block, inside = slice(start, stop), slice(0, stop - start)
        spread = spread[inside, inside]
        torch.addmm(weight[:, block], correction[:, block], spread, out=repaired[:, block])
        sweep_block(repaired[:, block], mask[:, block], spread, pivots[block], pattern)
        correction[:, stop:].addmm_(weight[:, block] - repaired[:, block], root[block, stop:])
    if not repaired.isfinite().all():
        row, column = repaired.isfinite().logical_not().nonzero()[0].tolist()
        raise nmbench.NumericalFailure(f"the repaired weight at ({row}, {column}) is {repaired[row, column].item()}.")
    return mask, repaired


def block_width(pattern: nmbench.Pattern, block_columns: int, columns: int) -> int:
    """Return the columns of a block: whole groups, at most `block_columns` if one group fits into `block_columns`."""
    return min(max(block_columns // pattern.group, 1) * pattern.group, columns)
