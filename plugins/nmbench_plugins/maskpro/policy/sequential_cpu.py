"""A mask and its gradient in one pass on a CPU, by inverse CDF: one or two kept weights of groups of 4 or 8.

Weights are e^(logit - level) with `level` the `keep`-th largest logit of the group, so that every draw finds a total of
1 or more. Draws are sequential: with u uniform and the remaining weights in ascending order, a draw takes the first
weight whose running sum exceeds u times the total. Small weights come first and get the small u, where floats are
finest: only events rarer than 2^-31, the grid of u, are lost. With D the total of the dropped and T of the group:

    S = {a}:     g_a = D / T
    S = {a, b}:  g_a = D e_a (e_a + 1 / T) / (e_a + e_b)   with e_i = 1 / (D + w_i),   g_b alike
    a dropped k: g_k = -w_k * (sum of the kept g) / D

These are the formulas of `closed_form`; `policy.sample` and `policy.grad_log_prob` are the readable versions. The code
follows the costs of torch on a CPU. An operation whose inputs and output have one type is ten times faster, so
conditions are 0.0 and 1.0, and choices are products and maxima. The low bits of a weight hold its position (an error of
2^-20 at most), so that sorting moves one number per weight. torch wakes one thread for every 2^15 numbers of an
operation, which costs most with many threads on a busy machine; so all operations work on columns, in parts for two
threads, and a part stays in cache. (On two idle cores a step is a quarter faster than with parts for one thread; where
another process has one of the cores, a step takes a quarter to a half longer.)
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

PART_GROUPS = 2**16
LOG2_E = 1.4426950408889634
SMALLEST, LARGEST = -80.0, 25.0  # of logit - level; no event rarer than e^-22 is drawn, and no square overflows
CODES = {4: torch.int32, 8: torch.int64}  # whole numbers with one byte for every weight of a group

Columns = list[Tensor]  # the i-th weights of n groups, [n] each


def suits(keep: int, group: int, device: torch.device) -> bool:
    """Return whether this module draws masks of this pattern on this device."""
    return keep <= 2 and group in CODES and device.type == "cpu" and sys.byteorder == "little"


def draw(logits: Tensor, keep: int, generator: torch.Generator, gradient: Tensor) -> Tensor:
    """Draw a mask, bool `[n, group]`, and store the gradient of its log P in `gradient` `[n, group]`.

    logits: float32 `[n, group]`, best as the transpose of contiguous columns. The draws do not depend on the parts.
    """
    groups, group = logits.shape
    codes = torch.empty(groups, dtype=CODES[group])
    for start in range(0, groups, PART_GROUPS):
        part = slice(start, start + PART_GROUPS)
        columns, slopes = list(logits[part].unbind(1)), list(gradient[part].unbind(1))
        words = torch.empty(len(columns[0]), keep, dtype=torch.int32).random_(generator=generator)
        codes[part] = draw_part(columns, words, slopes)
    return codes.view(torch.bool).view(groups, group)


def draw_part(logits: Columns, words: Tensor, gradient: Columns) -> Tensor:
    """Return the mask of one part as codes `[n]`, one byte a weight, from words int32 `[n, keep]`; set `gradient`."""
    weights = weights_of(logits, level(logits, words.shape[1]))
    left, kept = ascending(weights), []
    for word in words.unbind(1):
        value, left = pick(left, word)
        kept.append(value)
    gains, slope = gains_of(kept, total(left))
    code = torch.zeros(len(words), dtype=CODES[len(weights)])
    for j, (weight, target) in enumerate(zip(weights, gradient, strict=True)):
        hits = [torch.eq(weight, value, out=torch.empty_like(weight)) for value in kept]  # 0.0 or 1.0
        inside = total(hits)
        torch.mul(weight, slope, out=target).mul_(1 - inside)
        for hit, gain in zip(hits, gains, strict=True):
            target.addcmul_(hit, gain)
        code.add_(inside.to(code.dtype), alpha=256**j)
    return code


def level(logits: Columns, keep: int) -> Tensor:
    """Return the `keep`-th largest logit of every group, [n], for `keep` 1 or 2."""
    first, second = torch.maximum(logits[0], logits[1]), torch.minimum(logits[0], logits[1])
    for column in logits[2:]:
        second = torch.maximum(second, torch.minimum(first, column))
        first = torch.maximum(first, column)
    return first if keep == 1 else second


def weights_of(logits: Columns, level: Tensor) -> Columns:
    """Return e^(logit - level) with the position in the low bits: no two weights of a group are equal."""
    weights = [(column - level).clamp_(SMALLEST, LARGEST).mul_(LOG2_E).exp2_() for column in logits]
    for j, weight in enumerate(weights):
        weight.view(torch.int32).bitwise_and_(-len(weights)).bitwise_or_(j)
    return weights


def ascending(weights: Columns) -> Columns:
    """Return the weights with every group in ascending order."""
    result = list(weights)
    for end in range(len(result) - 1, 0, -1):
        for i in range(end):
            low, high = result[i], result[i + 1]
            result[i], result[i + 1] = torch.minimum(low, high), torch.maximum(low, high)
    return result


def pick(pool: Columns, word: Tensor) -> tuple[Tensor, Columns]:
    """Draw once in every group from weights in ascending order; `word`: whole numbers below 2^31, [n].

    Returns the drawn weight, [n], and the other weights in ascending order.
    """
    reach = [pool[0]]
    for weight in pool[1:]:
        reach.append(reach[-1] + weight)
    x = torch.empty_like(reach[-1]).copy_(word).add_(0.5).mul_(2.0**-31).mul_(reach.pop())
    value, others = pool[0], []
    for bound, low, high in zip(reach, pool, pool[1:], strict=False):
        value = torch.maximum(value, torch.ge(x, bound, out=torch.empty_like(x)).mul_(high))
        others.append(torch.maximum(low, torch.lt(x, bound, out=torch.empty_like(x)).mul_(high)))
    return value, others


def total(values: Columns) -> Tensor:
    """Return the sum over the columns, [n]."""
    result = values[0]
    for value in values[1:]:
        result = result + value
    return result


def gains_of(kept: Columns, dropped: Tensor) -> tuple[Columns, Tensor]:
    """Return the gradients of the kept, [n] each, and the factor of a dropped weight in its gradient, [n].

    `dropped` is D, [n].
    """
    if len(kept) == 1:
        share = (kept[0] + dropped).reciprocal_()
        return [dropped * share], share.neg_()
    one, other = ((weight + dropped).reciprocal_() for weight in kept)  # e_a, e_b
    share = (kept[0] + kept[1]).add_(dropped).reciprocal_()  # 1 / T
    scale = (one + other).reciprocal_()
    one = (one + share).mul_(one).mul_(scale)
    other = (other + share).mul_(other).mul_(scale)
    return [one * dropped, other * dropped], (one + other).neg_()
