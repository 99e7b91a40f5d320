"""The upper triangular root R of the damped Hessian, H = R R^T.

SparseGPT sweeps with U, the upper Cholesky factor of H^-1 (U^T U = H^-1). With J the reversal of rows, J H J = L L^T is
an ordinary Cholesky factorisation, R = J L J is upper triangular and R R^T = H, so that U = R^-1. One factorisation is
enough, and only blocks on the diagonal of R are inverted: `sweep` needs no other part of U.
"""

from __future__ import annotations

import torch
from torch import Tensor

import nmbench

HIGHEST_DAMPING = 1.0


def damped_root(gram: Tensor, dead: Tensor, damping: float) -> tuple[Tensor, float]:
    """Return R of `gram` `[in, in]`, damped and with ones on the diagonal where `dead` `[in]`, and the damping.

    damping * mean(diagonal) is added to the diagonal; damping is raised tenfold while there is no such root. Raises
    `NumericalFailure` beyond `HIGHEST_DAMPING`. `gram` does not change.
    """
    diagonal = gram.diagonal().masked_fill(dead, 1.0)
    mean = diagonal.mean()
    while True:
        root = upper_root(gram, diagonal + damping * mean)
        if root is not None:
            return root, damping
        if damping >= HIGHEST_DAMPING:
            raise nmbench.NumericalFailure(f"the Hessian has no Cholesky factor even with damping {damping:g}.")
        damping = min(max(10 * damping, 0.01), HIGHEST_DAMPING)


def upper_root(matrix: Tensor, diagonal: Tensor) -> Tensor | None:
    """Return R `[n, n]`, upper triangular, with R R^T = `matrix` with this `diagonal` `[n]`, in the matrix dtype.

    Returns None if the matrix with this diagonal is not positive definite in its dtype.
    """
    reversed_ = matrix.flip(0, 1)
    reversed_.diagonal().copy_(diagonal.flip(0))
    lower, failed = torch.linalg.cholesky_ex(reversed_)
    del reversed_  # as large as the result
    return lower.flip(0, 1) if not failed and lower.isfinite().all() else None


def inverses(root: Tensor, width: int) -> Tensor:
    """Return U_BB, the inverses of the blocks of `width` columns on the diagonal of R: `[blocks, width, width]`.

    The inverses are also blocks of R^-1, as R is triangular. The identity fills up a smaller last block.
    """
    columns = len(root)
    eye = torch.eye(width, dtype=root.dtype, device=root.device)
    blocks = eye.repeat(-(-columns // width), 1, 1)
    for block, start in zip(blocks, range(0, columns, width), strict=True):
        size = min(width, columns - start)
        block[:size, :size] = root[start : start + size, start : start + size]
    return torch.linalg.solve_triangular(blocks, eye.expand_as(blocks), upper=True).triu().contiguous()
