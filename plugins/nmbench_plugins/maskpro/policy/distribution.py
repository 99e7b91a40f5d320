"""The mask policy of MaskPro (arXiv 2506.12876): draw N of M weights without replacement, probability and gradient.

One logit per weight. For one group with w_i = exp(logit_i) and a set S of `keep` positions,

    P(S) = sum over the orders of S of  prod_i  w_i / (weight not drawn yet)

Everything is computed from the kept weights relative to D, the total weight of the *dropped* positions:

    rate_i = w_i / D,   r_i = rate_i / (1 + rate_i),   log P(S) = sum_{i in S} log r_i + log lift(rates)
    lift = P(S) / prod r_i  lies in [1, keep!]:  r_i is the chance that i alone is drawn before every dropped position

    gradient:  g_i > 0 for the kept,   g_k = -(w_k / D) * sum_{i in S} g_i for the dropped k

so no step subtracts nearly equal numbers and no weight underflows, whatever the gaps between logits. `lift` and the g_i
of the kept come from a closed form (`closed_form`, keep 1 and 2), a recursion over subsets (`subset_recursion`, keep 3
and 4) or an integral over time (`time_integral`, keep 5 and more).

All functions take groups along the last axis, 2 <= group <= 32. float32 and float64 are computed in their own dtype;
half precision is computed in float32 and returned in its own dtype. Memory: a few times one chunk of groups.
"""

from types import ModuleType

import torch
from torch import Tensor

from nmbench_plugins.maskpro.policy import closed_form, gumbel, subset_recursion, time_integral
from nmbench_plugins.maskpro.policy.groups import (
    check_logits,
    check_mask,
    chunks,
    columns,
    gaps_and_shares,
    working_dtype,
)


@torch.no_grad()
def sample(logits: Tensor, keep: int, generator: torch.Generator) -> Tensor:
    """Draw a mask that keeps exactly `keep` positions of every group: top-`keep` of logits + Gumbel noise.

    logits [..., group], floating; `generator` is on the device of the logits. Returns bool [..., group]. Equal keys:
    lower index wins. On the CPU the draws do not depend on how the leading axes are chunked: sampling two halves one
    after the other with one generator equals sampling the whole. On CUDA the draws depend on the chunks, because a
    generator advances by launch. Raises NMBenchError for non-finite logits or a `keep` outside 1..group-1. Source: Kool
    et al., arXiv 1903.06059.
    """
    rows = check_logits(logits, keep)  # [groups, group]
    mask = torch.empty(logits.shape, dtype=torch.bool, device=logits.device)
    out = mask.view(rows.shape)
    for part in chunks(rows):
        keys = gumbel.gumbel_keys(rows[part], working_dtype(logits), generator)  # [group, n]
        _store_columns(out[part], gumbel.top(keys, keep))
    return mask


@torch.no_grad()
def greedy(logits: Tensor, keep: int) -> Tensor:
    """Return the most likely mask, the `keep` largest logits of every group; equal logits: lower index wins.

    logits [..., group] -> bool [..., group]. Raises NMBenchError as `sample` does.
    """
    rows = check_logits(logits, keep)
    mask = torch.empty(logits.shape, dtype=torch.bool, device=logits.device)
    out = mask.view(rows.shape)
    for part in chunks(rows):
        _store_columns(out[part], gumbel.top(columns(rows[part], working_dtype(logits)), keep))
    return mask


@torch.no_grad()
def log_prob(logits: Tensor, mask: Tensor) -> Tensor:
    """Return log P(mask) of every group: logits and bool mask [..., group] -> [...], in the logits' dtype.

    Raises NMBenchError for non-finite logits or a mask that does not keep the same number in every group.
    """
    rows, kept, keep = check_mask(logits, mask)
    result = torch.empty(logits.shape[:-1], dtype=logits.dtype, device=logits.device)
    out = result.view(-1)
    for part in chunks(rows):
        gap, _ = gaps_and_shares(rows[part].to(working_dtype(logits)), kept[part], keep)
        alone = torch.logaddexp(gap, torch.zeros_like(gap)).sum(0)  # -sum log r_i
        out[part] = _scheme(keep).lift(_rate(gap)).log() - alone
    return result


@torch.no_grad()
def grad_log_prob(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the gradient of log P(mask) with respect to the logits, [..., group], in the logits' dtype.

    Sums to zero in every group. Raises NMBenchError for non-finite logits or a mask that does not keep the same number
    in every group.
    """
    rows, kept, keep = check_mask(logits, mask)
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    out = gradient.view(rows.shape)
    dtype = working_dtype(logits)
    for part in chunks(rows):
        if keep <= 2:
            _store_columns(out[part], closed_form.gradient(columns(rows[part], dtype), kept[part], keep))
        else:
            out[part] = _gradient(rows[part].to(dtype), kept[part], keep)
    return gradient


def _gradient(rows: Tensor, kept: Tensor, keep: int) -> Tensor:
    gap, share = gaps_and_shares(rows, kept, keep)
    gain = _scheme(keep).kept_gradient(_rate(gap))  # [keep, n]
    result = torch.empty_like(rows)
    result.masked_scatter_(kept, gain.t().contiguous())
    return result.masked_scatter_(~kept, share.mul_(-gain.sum(0)).t().contiguous())


def _scheme(keep: int) -> ModuleType:
    """Return the module for this many kept positions, with `lift(rate)` and, beyond 2, `kept_gradient(rate)`."""
    if keep <= 2:
        return closed_form
    return subset_recursion if keep <= 4 else time_integral


def _rate(gap: Tensor) -> Tensor:
    """Return w / D of the kept, between e^-60 and e^60; a rate beyond changes no result by more than 1e-26."""
    return gap.neg().clamp_(-60, 60).exp_()


def _store_columns(rows: Tensor, values: Tensor) -> None:
    """Write values [group, n] into rows [n, group]: a copy per column is several times faster than one of `.t()`."""
    for column, value in zip(rows.unbind(-1), values, strict=True):
        column.copy_(value)
