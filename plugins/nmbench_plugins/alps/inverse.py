"""The inverse of a positive definite matrix from its Cholesky factor L, made of matrix products.

`torch.cholesky_inverse` solves for all columns by substitution, in full float32. Here the rows of M = L^-1 follow block
by block from those above, and L^-T L^-1 is M^T M without the blocks that are zero: about n^3 operations for size n, in
matrix products, and in TF32 where that is allowed (`nmbench.calibration.tf32`). Only the blocks on the diagonal are
inverted by substitution, in full float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nmbench.calibration import full_float32

BLOCK = 1024  # rows of a block


def inverse_of(lower: Tensor, block: int = BLOCK) -> Tensor:
    """Return (L L^T)^-1 `[n, n]` of the lower triangular L `[n, n]`, whose storage is overwritten."""
    return gram_of(triangular_inverse(lower, block), block)


def triangular_inverse(lower: Tensor, block: int = BLOCK) -> Tensor:
    """Return L^-1 `[n, n]` in the storage of the lower triangular `lower`, L `[n, n]`."""
    for rows in blocks(len(lower), block):
        above = slice(0, rows.start)
        with full_float32():
            unit = torch.eye(rows.stop - rows.start, dtype=lower.dtype, device=lower.device)
            diagonal = torch.linalg.solve_triangular(lower[rows, rows], unit, upper=False)
        product = lower[rows, above] @ lower[above, above]
        lower[rows, above].addmm_(diagonal, product, beta=0, alpha=-1)
        lower[rows, rows] = diagonal
    return lower


def gram_of(lower: Tensor, block: int = BLOCK) -> Tensor:
    """Return M^T M `[n, n]` of the lower triangular `lower`, M `[n, n]`."""
    product = torch.empty_like(lower)
    for rows in blocks(len(lower), block):
        below = slice(rows.start, None)
        torch.mm(lower[below, rows].t(), lower[below, : rows.stop], out=product[rows, : rows.stop])
        product[: rows.start, rows] = product[rows, : rows.start].t()
    return product


def blocks(size: int, block: int) -> Iterator[slice]:
    """Yield slices of at most `block` indices that cover 0 to `size`."""
    return (slice(start, min(start + block, size)) for start in range(0, size, block))
