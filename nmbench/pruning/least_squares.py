"""The kept weights that bring the outputs of a layer closest to a target, by conjugate gradients.

For one output row let w be its weights, X the inputs `[tokens, in]` and t the target of its outputs. With H = X^T X and
c = t^T X,

    |t - X w|^2  =  |t|^2 + f(w),    f(w) = w H w^T - 2 c w^T.

The kept weights descend on f from a start w_0; dropped weights are zero. H and c may have any common factor: for
`LayerStats.gram` as H, the target of the dense weights W is c = W H. With damping, the objective is
f(w) + d |w - w_0|^2, where d is `damping` times the mean of the diagonal of H; what lowers this sum lowers f.

Rows are independent, so that all rows take each step together, in one matrix product (Hestenes and Stiefel, Journal of
Research of the National Bureau of Standards 49, 1952; the diagonal of H as the preconditioner).
"""

from __future__ import annotations

import torch
from torch import Tensor

FLAT = 4  # rounding errors: a curvature below as many, relative to that of the diagonal of H alone, counts as none


def conjugate_gradients(
    start: Tensor,
    mask: Tensor,
    gram: Tensor,
    linear: Tensor,
    iterations: int = 30,
    tolerance: float = 1e-4,
    damping: float = 0.0,
) -> Tensor:
    """Return kept weights `[out, in]` of a lower error than `start` `[out, in]`, zero where bool `mask` is False.

    `gram`: H `[in, in]`. `linear`: c of every row, `[out, in]`. Stops after `iterations`, or when the gradients of all
    rows, in the norm of the preconditioner, have fallen to `tolerance` of those at the start. float32 or float64, the
    same for all tensors; nothing is changed in place. The error of a row is never above that of its start; a row whose
    sums overflow keeps its start.
    """
    start, linear, scale = scaled(start.where(mask, 0.0), linear, gram)
    shift = damping * gram.diagonal().mean()
    diagonal = gram.diagonal() + shift
    inverse = diagonal.reciprocal().nan_to_num(posinf=0.0)  # [in]; 0 for a dead input
    flat = FLAT * torch.finfo(gram.dtype).eps * diagonal
    slope = linear - start @ gram
    residual = slope.masked_fill(~mask, 0.0)
    moved, direction = start.clone(), residual * inverse
    energy = (residual * direction).sum(dim=1)  # [out]
    goal = tolerance**2 * energy
    for _ in range(iterations):
        if not (energy > goal).any():
            break
        image = torch.addmm(direction * shift, direction, gram).masked_fill_(~mask, 0.0)
        curvature = (direction * image).sum(dim=1)
        step = ratio(energy, curvature.where(curvature > direction.square() @ flat, 0.0))
        moved.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        preconditioned = residual * inverse
        before, energy = energy, (residual * preconditioned).sum(dim=1)
        direction.mul_(ratio(energy, before)).add_(preconditioned)
    return lower_rows(start, moved, gram, slope) * scale + 0.0  # no -0.0


def better_rows(start: Tensor, found: Tensor, gram: Tensor, linear: Tensor) -> Tensor:
    """Return the rows of `found` `[out, in]` whose f is below that of `start` `[out, in]`; for the others, `start`.

    `gram` `[in, in]` and `linear` `[out, in]` are H and c. Take it once more after a cast to fewer bits.
    """
    return lower_rows(start, found, gram, linear - start @ gram)


def lower_rows(start: Tensor, found: Tensor, gram: Tensor, slope: Tensor) -> Tensor:
    """Return the same rows from c - start H, `slope` `[out, in]`."""
    change, slope, _ = scaled(found - start, slope, gram)
    fall = (change * (2 * slope - change @ gram)).sum(dim=1, keepdim=True)  # f(start) - f(found), without cancellation
    return found.where(fall > 0, start)


def scaled(weight: Tensor, linear: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `weight` and `linear` divided by a power of two for each row, and these divisors `[out, 1]`.

    The squares of large weights would overflow otherwise. A power of two does not round.
    """
    kind = torch.finfo(weight.dtype)
    reach = linear.abs().amax(dim=1, keepdim=True) / gram.diagonal().amax().clamp_min(kind.tiny)
    largest = weight.abs().amax(dim=1, keepdim=True).maximum(reach).clamp(kind.tiny, kind.max)
    scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
    return weight / scale, linear / scale, scale


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return `numerator / denominator` `[out, 1]`, both `[out]`; 0 where the denominator is not above 0."""
    return (numerator / denominator).where(denominator > 0, 0.0)[:, None]
