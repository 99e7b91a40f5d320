"""One layer as a least-squares problem whose matrix has a unit diagonal.

The outputs X W^T of the dense weights W are to be kept by weights with few entries. With H the Gram matrix of the
inputs plus `damping` times the mean of its diagonal, and s = sqrt(diag H), the weights become B = W s and the matrix
H / (s s^T), so that a column of B counts by its size: |B| is Wanda's score but for the damping. Weights on dead inputs
are zero from the start, as in SparseGPT: damping would give them a size.

The paper aims at X W^T with X the inputs of the layer in the pruned model. The target here may lie between X W^T
(a = 0) and the outputs Y W^T of the dense model (a = 1). With D = (Y - X)^T X, the linear term B H of the problem
becomes B H + a W D / s, and the best weights, if all are kept, become B + (a W D / s) H^-1: the `goal`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nmbench.calibration import full_float32
from nmbench_plugins.alps.inverse import inverse_of

SMALLEST = 1e-8  # added to s, as in the paper's code: without damping, s may be 0


@dataclass(frozen=True)
class Problem:
    """`dense` `[out, in]`: the dense weights times `scale` `[in]`; `gram` `[in, in]`, of unit diagonal; float32.

    `pull` `[out, in]`: what the target adds to the linear term; None if the target is the outputs of `dense`.
    """

    dense: Tensor
    gram: Tensor
    scale: Tensor
    pull: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, gram: Tensor, damping: float, drift: Tensor | None = None) -> Problem:
        """Return the problem of a layer with `weight` `[out, in]` and the Gram matrix `gram` `[in, in]` float32.

        `drift` `[in, in]` float32: a D, if the target is not the outputs for these inputs.
        """
        damped = gram.clone()
        damped.diagonal().add_(damping * gram.diagonal().mean())
        scale = damped.diagonal().sqrt() + SMALLEST
        damped.div_(scale).div_(scale[:, None])
        pull = None if drift is None else weight.float() @ drift / scale
        return cls(weight.float().masked_fill(gram.diagonal() == 0, 0.0) * scale, damped, scale, pull)

    def linear(self) -> Tensor:
        """Return the linear term of the problem `[out, in]`."""
        linear = self.dense @ self.gram
        return linear if self.pull is None else linear.add_(self.pull)

    def goal(self) -> Tensor | None:
        """Return the best weights `[out, in]` if all are kept; None if `gram` has no Cholesky factor."""
        if self.pull is None:
            return self.dense
        inverse = self.inverse(0.0)
        return None if inverse is None else torch.addmm(self.dense, self.pull, inverse)

    def inverse(self, penalty: float) -> Tensor | None:
        """Return (gram + penalty I)^-1 `[in, in]`; None if the matrix is not positive definite in its dtype."""
        shifted = self.gram.clone()
        shifted.diagonal().add_(penalty)
        with full_float32():
            lower, failed = torch.linalg.cholesky_ex(shifted)
        del shifted  # as large as the result
        if failed:
            return None
        inverse = inverse_of(lower)
        return inverse if inverse.diagonal().isfinite().all() else None  # its largest entries are on the diagonal
