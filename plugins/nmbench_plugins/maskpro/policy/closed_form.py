"""One or two kept weights of a group: closed forms that subtract no nearly equal numbers.

With D the total weight of the dropped, T of the group, e_i = D / (D + w_i) and p_D = D / T, for S = {a} and S = {a, b}:

    P(a)    = r_a                      g_a = e_a
    P(a, b) = r_a r_b (1 + p_D)        g_a = e_a (e_a + p_D) / (e_a + e_b),  g_b alike
    a dropped k:                       g_k = -(w_k / D) * (sum of the kept g)

The gradient is that of section 3 of MaskPro (arXiv 2506.12876) for N = 2, with 1 - p and its products replaced by
sums of positive terms: 1 - r_i = e_i, and the chance that b was drawn before a is e_a / (e_a + e_b).
"""

import torch
from torch import Tensor

from nmbench_plugins.maskpro.policy.groups import columns


def lift(rate: Tensor) -> Tensor:
    """Return P(S) / prod r_i, [n], from rate = w_i / D of the one or two kept, [keep, n]."""
    if len(rate) == 1:
        return torch.ones_like(rate[0])
    return 1 + 1 / (1 + rate.sum(0))


def gradient(logits: Tensor, kept: Tensor, keep: int) -> Tensor:
    """Return grad log P as columns [group, n] from logits columns [group, n] (overwritten) and kept rows [n, group].

    This is the inner loop of a CPU learner. The mask enters as numbers 0 and 1, because on a CPU a product is ten times
    faster than `where`. All factors are finite, so that every product with 0 is 0.
    """
    inside = columns(kept, logits.dtype)  # [group, n], 1 for the kept
    outside = 1 - inside
    top = logits.addcmul(inside, torch.full_like(logits[:1], -1e30)).amax(0)  # [n], largest dropped logit
    weight = logits.sub_(top).clamp_(-60, 60).exp_()  # relative to that; e^60 is as good as infinite
    dropped = outside.mul_(weight)  # [group, n], 0 for the kept
    total = dropped.sum(0)  # [n], D
    gain = torch.add(weight, total).reciprocal_().mul_(total).mul_(inside)  # [group, n], e_i, 0 for the dropped
    if keep == 2:
        scale = gain.sum(0).reciprocal_()  # [n], 1 / (e_a + e_b)
        gain.mul_(torch.add(gain, total / weight.sum(0)).mul_(scale))
    return gain.addcmul_(dropped, (gain.sum(0) / total).neg_())
