"""Gumbel-top-k draws: keys = logits - log E with E ~ Exp(1); the `keep` largest keys are a draw without replacement.

Source: Kool, van Hoof, Welling, arXiv 1903.06059; -log E of an exponential E is a Gumbel variable.
"""

import torch
from torch import Tensor

from nmbench_plugins.maskpro.policy.groups import columns


def gumbel_keys(rows: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return logits + Gumbel noise as columns [group, n] of `dtype`, from logits rows [n, group].

    The noise comes from whole numbers, not from `Tensor.uniform_`, whose 24 bits cut every event rarer than 6e-8, nor
    from the CPU `exponential_`, whose stream has a period of only 2^31.
    """
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    cells = torch.empty(rows.shape, dtype=integer, device=rows.device).random_(generator=generator)  # [n, group]
    return columns(rows, dtype).sub_(log_exponential(columns(cells, dtype)))


def log_exponential(cells: Tensor) -> Tensor:
    """Turn whole numbers below 2^31 (float64: 2^63), as floats, into log E in place.

    E = -log(1 - u) with u the middle of one of that many equal cells: u is never 0, all cells are equally
    likely, and small E, which decide rare events, are as fine as the cells.
    """
    bits = 63 if cells.dtype == torch.float64 else 31
    u = cells.add_(0.5).mul_(2.0**-bits)
    u.clamp_(max=1 - torch.finfo(u.dtype).eps / 2)  # the last cells round to 1, where E would be infinite
    return u.neg_().log1p_().neg_().log_()


def top(keys: Tensor, keep: int) -> Tensor:
    """Return the mask of the `keep` largest keys in every column, bool [group, n]; equal keys: lower index wins.

    The function counts, for every key, the keys below that key. (key, index) is a total order, so exactly `keep` keys
    are above group - keep others.
    """
    group = len(keys)
    below = torch.arange(group, dtype=torch.uint8, device=keys.device)[:, None].repeat(1, keys.shape[1])
    for i in range(group - 1):
        wins = (keys[i] >= keys[i + 1 :]).view(torch.uint8)  # [group - 1 - i, n]
        below[i] += wins.sum(0, dtype=torch.uint8)
        below[i + 1 :] -= wins
    return below >= group - keep
