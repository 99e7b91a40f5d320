"""The soft mask of a group, a relaxed draw of one of its patterns, and its gradient.

With candidates P `[C, M]` of 0 and 1, keys z = scale * gates + Gumbel noise and temperature tau (Gumbel-softmax: Jang
et al., arXiv 1611.01144; Maddison et al., 1611.00712)

    y = softmax(z / tau),    m = P^T y.

m sums to N, and its entries lie in [0, 1]. As tau falls, m becomes the pattern of the largest key, which is a draw from
softmax(scale * gates). With the slope h = dL/dm and p = P h

    dL/dz = y * (p - y . p) / tau.

Tensors have the patterns or the members of a group first: `[C, groups]` or `[M, groups]`. Nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def chosen(keys: Tensor, temperature: Tensor | float) -> Tensor:
    """Return y, the shares of the patterns, `[C, groups]`."""
    return torch.softmax(keys / temperature, dim=0)


def soft_mask(shares: Tensor, patterns: Tensor) -> Tensor:
    """Return the soft mask m `[M, groups]` of `shares` y; `patterns` is P."""
    return patterns.t() @ shares


def keys_gradient(shares: Tensor, slope: Tensor, patterns: Tensor, temperature: Tensor | float) -> Tensor:
    """Return the gradient of the keys `[C, groups]` from `slope`, that of the soft mask `[M, groups]`."""
    of_shares = patterns @ slope  # [C, groups]
    mean = (shares * of_shares).sum(dim=0, keepdim=True)
    return of_shares.sub_(mean).mul_(shares).div_(temperature)


def members(rows: Tensor, group: int) -> Tensor:
    """Return `[rows, in]` with the members of the groups first, `[M, groups]`."""
    return rows.reshape(-1, group).t()


def as_rows(members: Tensor, inputs: int) -> Tensor:
    """Return `[M, groups]` as `[rows, in]` again."""
    return members.t().reshape(-1, inputs)
