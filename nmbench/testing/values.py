"""Values that break pruning code, made from a kind and a seed: ties, zeros, huge and subnormal values."""

from __future__ import annotations

import torch
from torch import Tensor

from nmbench.methods import LayerStats

KINDS = ("normal", "ties", "zeros", "signed zeros", "huge", "subnormal", "half grid", "one outlier")


def values(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Values of one kind, float32 of `shape`, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    if kind == "ties":
        return torch.randint(-2, 3, shape, generator=generator).float()
    if kind == "zeros":
        return normal * (torch.rand(shape, generator=generator) < 0.3)
    if kind == "signed zeros":
        return torch.zeros(shape).copysign(normal)
    if kind == "huge":
        return normal * 1e30
    if kind == "subnormal":
        return normal * 1e-41
    if kind == "half grid":
        return normal.half().float()
    if kind == "one outlier":
        normal.view(-1)[int(torch.randint(normal.numel(), (1,), generator=generator))] = 1e4
    return normal


def statistics(inputs: Tensor, windows: int) -> LayerStats:
    """`LayerStats` of inputs `[tokens, in]` from `windows` windows, computed from the definition."""
    x = inputs.float()
    return LayerStats(windows, len(x), (x.square().sum(dim=0) / windows).sqrt(), 2.0 / windows * x.T @ x)
