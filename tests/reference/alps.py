"""ALPS (arXiv 2406.07831) in plain PyTorch, written from the paper and from a description of its code.

Matrices are inputs x outputs, the dual variable V is kept as it is, and the inverse comes from eigenvectors in float64:
slow and readable. Nothing of nmbench is used.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Choose = Callable[[Tensor], Tensor]  # [in, out] -> bool [in, out]: the largest N of every M entries of a column


def largest(keep: int, group: int, unit: int = 1) -> Choose:
    """The largest `keep` of every `group` entries of a column, the first among equals.

    Of units of `unit` entries, those with the largest norms.
    """

    def choose(matrix: Tensor) -> Tensor:
        inputs, outputs = matrix.shape
        groups = matrix.T.reshape(outputs * (inputs // group), group // unit, unit).norm(dim=2)
        order = groups.sort(dim=1, descending=True, stable=True).indices
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, : keep // unit], True)
        return kept.repeat_interleave(unit, dim=1).reshape(outputs, inputs).T

    return choose


def search(
    dense: Tensor, gram: Tensor, choose: Choose, share: float, rho: float = 0.1, most: int = 300
) -> tuple[Tensor, Tensor, int]:
    """The mask and the weights on it `[in, out]` for `dense` `[in, out]`, and the number of iterations.

    `share` is N / M.
    """
    values, vectors = torch.linalg.eigh(gram.double())
    target = gram @ dense
    first = choose(dense)
    start = torch.where(first, dense, 0.0)
    D, V, seen, raised = start.clone(), torch.zeros_like(dense), first, False
    inverse = (vectors @ ((1 / (values + rho))[:, None] * vectors.T)).to(dense.dtype)
    for iteration in range(1, most + 1):
        B = inverse @ (target - V + rho * D)
        kept = choose(B + V / rho)
        D = torch.where(kept, B + V / rho, 0.0)
        V = V + rho * (B - D)
        if iteration % 3:
            continue
        change = (kept != seen).sum().item() / (dense.numel() * share)
        seen = kept
        if change == 0 and raised:
            break
        if change > 0.1:
            rho, raised = rho * 1.3, True
        elif change > 0.005:
            rho, raised = rho * 1.2, True
        elif change > 0 and raised:
            rho = rho * 1.1
        elif change > 0:
            rho, D, V = rho / 5, start.clone(), torch.zeros_like(dense)
        else:
            rho = rho / 5
        rho = min(rho, 1e6)
        if iteration > 30 and change < 3e-4:
            break
        inverse = (vectors @ ((1 / (values + rho))[:, None] * vectors.T)).to(dense.dtype)
    kept = choose(B)
    return kept, torch.where(kept, B, 0.0), iteration


def repair(weight: Tensor, mask: Tensor, dense: Tensor, gram: Tensor, steps: int = 10) -> Tensor:
    """Conjugate gradients on the kept entries of `weight` `[in, out]`, every column by itself."""
    residual = torch.where(mask, gram @ (dense - weight), 0.0)
    direction, energy = residual, residual.square().sum(dim=0)
    for _ in range(steps):
        image = gram @ direction
        step = energy / (direction * image).sum(dim=0).clamp_min(1e-30)
        weight, residual = weight + step * direction, torch.where(mask, residual - step * image, 0.0)
        before, energy = energy, residual.square().sum(dim=0)
        direction = residual + energy / before.clamp_min(1e-30) * direction
    return weight


def solve(weight: Tensor, gram: Tensor, choose: Choose, share: float, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """The mask and the repaired weight `[out, in]` of a layer with `weight` `[out, in]` and its Gram matrix."""
    damped = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    scale = damped.diagonal().sqrt() + 1e-8
    damped = damped / scale / scale[:, None]
    dense = (weight * scale).T
    mask, found, _ = search(dense, damped, choose, share)
    return mask.T, repair(found, mask, dense, damped).T / scale
