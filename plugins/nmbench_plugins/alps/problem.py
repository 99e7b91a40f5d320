"""One layer as a least-squares problem whose matrix has a unit diagonal.

The outputs X W^T of the dense weights W are to be kept by weights with few entries. With H the Gram matrix of the
inputs plus `damping` times the mean of its diagonal, and s = sqrt(diag H), the weights become B = W s and the matrix
H / (s s^T), so that a column of B counts by its size: |B| is Wanda's score but for the damping. Weights on dead inputs
are zero from the start, as in SparseGPT: damping would give them a size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 1e-8  # added to s, as in the paper's code: without damping, s may be 0


@dataclass(frozen=True)
class Problem:
    """`dense` `[out, in]`: the dense weights times `scale` `[in]`; `gram` `[in, in]`, of unit diagonal; float32."""

    dense: Tensor
    gram: Tensor
    scale: Tensor

    @classmethod
    def of(cls, weight: Tensor, gram: Tensor, damping: float) -> Problem:
        """Return the problem of a layer with `weight` `[out, in]` and the Gram matrix `gram` `[in, in]` float32."""
        damped = gram.clone()
        damped.diagonal().add_(damping * gram.diagonal().mean())
        scale = damped.diagonal().sqrt() + SMALLEST
        damped.div_(scale).div_(scale[:, None])
        return cls(weight.float().masked_fill(gram.diagonal() == 0, 0.0) * scale, damped, scale)

    def factor(self, penalty: float) -> Tensor | None:
        """Return (gram + penalty I)^-1 `[in, in]`; None if the matrix is not positive definite in its dtype."""
        shifted = self.gram.clone()
        shifted.diagonal().add_(penalty)
        lower, failed = torch.linalg.cholesky_ex(shifted)
        del shifted  # as large as the result
        if failed:
            return None
        inverse = torch.cholesky_inverse(lower)
        return inverse if inverse.isfinite().all() else None
