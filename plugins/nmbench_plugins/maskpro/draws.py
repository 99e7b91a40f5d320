"""Gumbel-top-k draws: keys = logits - log E with E ~ Exp(1); the `keep` largest keys are a draw without replacement.

Source: Kool, van Hoof, Welling, arXiv 1903.06059; -log E of an exponential E is a Gumbel variable.
"""

import torch
from torch import Tensor

from nmbench_plugins.maskpro.groups import columns


def gumbel_keys(rows: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return logits + Gumbel noise as columns [group, n] of `dtype`, from logits rows [n, group].

    E = -log(1 - u) with u the midpoint of one of 2^31 equal cells (2^63 in float64): u is never 0, small E, which
    decide rare events, are as fine as the cells, and no cell is favoured. Not `Tensor.uniform_`, whose 24 bits cut
    every event rarer than 6e-8, nor the CPU `exponential_`, whose stream has a period of only 2^31.
    """
    integer, bits = (torch.int64, 63) if dtype == torch.float64 else (torch.int32, 31)
    cells = torch.empty(rows.shape, dtype=integer, device=rows.device).random_(generator=generator)  # [n, group]
    u = columns(cells, dtype).add_(0.5).mul_(2.0**-bits)
    u.clamp_(max=1 - torch.finfo(dtype).eps / 2)  # the last cells round to 1, where E would be infinite
    noise = u.neg_().log1p_().neg_().log_()  # log E
    return columns(rows, dtype).sub_(noise)


def top(keys: Tensor, keep: int) -> Tensor:
    """Return the mask of the `keep` largest keys in every column, bool [group, n]; equal keys: lower index wins.

    Counts for every key how many it beats. (key, index) is a total order, so exactly `keep` beat group - keep others.
    """
    group = len(keys)
    beaten = torch.arange(group, dtype=torch.uint8, device=keys.device)[:, None].repeat(1, keys.shape[1])
    for i in range(group - 1):
        wins = (keys[i] >= keys[i + 1 :]).view(torch.uint8)  # [group - 1 - i, n]
        beaten[i] += wins.sum(0, dtype=torch.uint8)
        beaten[i + 1 :] -= wins
    return beaten >= group - keep
