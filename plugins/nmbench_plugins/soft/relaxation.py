"""The soft mask of a group, a relaxed draw of N of M without replacement, and its gradient.

With keys a_1 = logits / lam + Gumbel noise and temperature tau (RoI, arXiv 2608.23048; Xie and Ermon, 1901.10517):

    mu_k    = softmax(a_k / tau)              k = 1 ... N
    a_(k+1) = a_k + log(1 - mu_k)
    m       = mu_1 + ... + mu_N

m sums to N. As tau falls, m becomes the mask of the N largest keys, which is a draw from MaskPro's policy. An entry of
m may exceed 1: a chosen key falls by its lead / tau, and is chosen again where all other keys are lower still. That is
so at tau near 1, and from N = 3 on where the lead among chosen keys is below tau times their lead over the next.

1 - mu of the largest key is computed from the other keys. A bound on mu in place of that, such as 1 - 1e-6, lowers a
chosen key by 13.8 only, so that a weight whose key leads by more would be chosen twice.

All tensors have the group first: `[group, ...]`, of a float dtype. Nothing waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Round(NamedTuple):
    """One of the rounds before the last: `chosen` is mu; `lead`, bool, marks the largest key."""

    chosen: Tensor
    lead: Tensor
    log_rest: Tensor  # logarithm of the softmax of all others; -inf at the lead
    fall: Tensor  # log(1 - mu)


def soft_mask(keys: Tensor, temperature: Tensor | float, keep: int) -> Tensor:
    """Return the soft mask m of `keys`, entries at least 0, which sums to `keep` along the group."""
    mask = torch.zeros_like(keys)
    for _ in range(keep - 1):
        drawn = one_round(scaled(keys, temperature))
        mask += drawn.chosen
        keys = keys + drawn.fall
    return mask.add_(torch.softmax(scaled(keys, temperature), dim=0))


def soft_mask_gradient(keys: Tensor, temperature: Tensor | float, keep: int, slope: Tensor) -> Tensor:
    """Return the gradient of sum(slope * m) with respect to `keys`; the rounds are computed again."""
    rounds = []
    for _ in range(keep - 1):
        rounds.append(one_round(scaled(keys, temperature)))
        keys = keys + rounds[-1].fall
    gradient = of_chosen(torch.softmax(scaled(keys, temperature), dim=0), slope) / temperature
    for drawn in reversed(rounds):
        inside = of_chosen(drawn.chosen, slope).add_(of_fall(drawn, gradient))
        gradient = gradient.add_(inside.div_(temperature))
    return gradient


def scaled(keys: Tensor, temperature: Tensor | float) -> Tensor:
    """Return keys / tau from the largest on, which is 0: a low temperature then does not enlarge its rounding."""
    return (keys - keys.amax(dim=0, keepdim=True)) / temperature


def one_round(scaled: Tensor) -> Round:
    """Return mu, and what its gradient needs, of scaled keys."""
    lead = place_of(scaled) == scaled.max(dim=0, keepdim=True).indices  # argmax takes seven times as long on a CPU
    others = scaled.masked_fill(lead, -torch.inf)
    log_rest = others.logsumexp(dim=0, keepdim=True)
    log_total = log_rest.exp().log1p()
    chosen = (scaled - log_total).exp()
    fall = torch.where(lead, log_rest - log_total, torch.log1p(-chosen))
    return Round(chosen, lead, others - log_rest, fall)


def of_chosen(chosen: Tensor, slope: Tensor) -> Tensor:
    """Return the gradient of sum(slope * mu) with respect to the scaled keys."""
    weighted = chosen * slope
    return weighted - chosen * weighted.sum(dim=0, keepdim=True)


def of_fall(drawn: Round, slope: Tensor) -> Tensor:
    """Return the gradient of sum(slope * log(1 - mu)) with respect to the scaled keys z.

    log(1 - mu_i) is the log-sum-exp of all z but z_i, less that of all z. Its derivative in z_j is the softmax of j
    among all but i, less mu_j. That softmax is mu_j / (1 - mu_i), and exp(`log_rest`) where i leads: nothing cancels.
    """
    chosen, lead = drawn.chosen, drawn.lead
    share = (slope / (1 - chosen)).masked_fill(lead, 0.0)
    others = share.sum(dim=0, keepdim=True) - share
    leading = slope.masked_fill(~lead, 0.0).sum(dim=0, keepdim=True)
    return chosen * (others - slope.sum(dim=0, keepdim=True)) + leading * drawn.log_rest.exp()


def place_of(columns: Tensor) -> Tensor:
    """Return the indices inside a group, int64 `[group, 1, ...]`."""
    return torch.arange(len(columns), device=columns.device).view(-1, *[1] * (columns.dim() - 1))


def columns(rows: Tensor, group: int) -> Tensor:
    """Return `[..., in]` with the group first: a copy `[group, groups]`."""
    return rows.reshape(-1, group).t().contiguous()


def as_rows(columns: Tensor, shape: torch.Size) -> Tensor:
    """Return `[group, groups]` as rows of `shape` again."""
    return columns.t().reshape(shape)
