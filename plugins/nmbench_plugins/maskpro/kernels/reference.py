"""The functions of `launch` in plain torch on the CPU, slow and readable: the same random words, the same draws.

Masks agree with those of the programs unless rounding decides a draw, in fewer than one of 10^5 groups. Gradients are
those of `policy` in float64.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from nmbench_plugins.maskpro import policy
from nmbench_plugins.maskpro.kernels.launch import CHUNK, ROUNDS
from nmbench_plugins.maskpro.kernels.philox import counters, philox
from nmbench_plugins.maskpro.policy import gumbel

LARGEST = 36.0  # log2 of the largest weight
MASK_STREAM, ROUNDING_STREAM = 0, 1


class Place(NamedTuple):
    """The source of the random words of a layer: key, first counter, and rounds of Philox."""

    seed: int
    first_group: int
    rounds: int


@torch.no_grad()
def step(
    logits: Tensor,
    weight: Tensor,
    out: Tensor,
    keep: int,
    group: int,
    *,
    seed: int,
    first_group: int,
    step: Tensor,
    scale: Tensor,
    update: bool,
    draw: bool,
    rounds: int = ROUNDS,
) -> None:
    """Do as `launch.step`."""
    place, now = Place(seed, first_group, rounds), int(step)
    if update:
        old = draw_mask(logits, keep, group, place, now - 1)
        logits.copy_(_updated(logits, old, group, place, now, scale))
    if draw:
        out.copy_(torch.where(draw_mask(logits, keep, group, place, now), weight, 0))


@torch.no_grad()
def greedy(logits: Tensor, weight: Tensor, out: Tensor, keep: int, group: int) -> None:
    """Do as `launch.greedy`."""
    mask = gumbel.top(logits.reshape(-1, group).t(), keep).t().reshape(logits.shape)
    out.copy_(torch.where(mask, weight, 0))


def draw_mask(logits: Tensor, keep: int, group: int, place: Place, step: int) -> Tensor:
    """Draw `keep` members of every group one after the other by inverse CDF: logits [out, in] -> bool [out, in]."""
    rows = logits.reshape(-1, group).float()  # [groups, group]
    words = _words(place, logits.numel(), step, MASK_STREAM)  # [chunks, 4]
    used = words[:, : keep * (CHUNK // group)].reshape(-1, keep)[: len(rows)]  # [groups, keep]
    level = rows.topk(keep).values[:, -1:]
    exponents = ((rows - level) * math.log2(math.e)).clamp(max=LARGEST)
    exponents = (
        exponents.view(torch.int32) & -group | torch.arange(group, dtype=torch.int32, device=rows.device)
    ).view(torch.float32)
    exponents, left = exponents.sort(-1)  # the low bits make all of a group differ
    weights = exponents.exp2()
    drawn = torch.zeros_like(rows, dtype=torch.bool)
    for k in range(keep):
        picked = _pick(weights, used[:, k : k + 1])
        drawn.scatter_(1, left.gather(1, picked), True)
        others = torch.arange(left.shape[1], device=left.device) != picked
        left, weights = left[others].view(len(left), -1), weights[others].view(len(left), -1)
    return drawn.view(logits.shape)


def _pick(weights: Tensor, word: Tensor) -> Tensor:
    """Return the index of one draw, [n, 1], from ascending weights [n, members] with words [n, 1]."""
    columns = itertools.accumulate(weights.unbind(-1))  # one by one: a parallel sum is not monotonic
    reach = torch.stack(list(columns), -1)
    u = word.float() * 2.0**-32 + 2.0**-33  # in the middle of one of 2^32 cells
    return (u * reach[:, -1:] >= reach[:, :-1]).sum(-1, keepdim=True)


def _updated(logits: Tensor, old: Tensor, group: int, place: Place, step: int, scale: Tensor) -> Tensor:
    exact = logits.double()
    rows = exact.reshape(-1, group)  # [groups, group]
    slope = policy.grad_log_prob(rows, old.reshape(-1, group))
    exact += scale.double() * slope.view(logits.shape)
    if logits.dtype == torch.float32:
        return exact.float()
    return _round_at_random(exact.float(), _words(place, logits.numel(), step, ROUNDING_STREAM))


def _round_at_random(values: Tensor, words: Tensor) -> Tensor:
    """Round to float16, up with the probability that keeps the mean; 13 random bits a value, two values a word."""
    bits = torch.stack((words & 0x1FFF, words >> 16 & 0x1FFF), -1).view(-1)[: values.numel()].view(values.shape)
    size = values.double().abs().clamp(max=65504)
    exponent = torch.frexp(size).exponent.clamp(min=-13) - 11  # of the last place of a float16
    count = torch.ldexp(size, -exponent)  # in units of that
    rounded = torch.ldexp((count + bits / 2**13).floor(), exponent)
    return rounded.copysign(values.double()).half()


def _words(place: Place, weights: int, step: int, stream: int) -> Tensor:
    """Return the words of every chunk of the layer, int64 [chunks, 4]."""
    chunks = -(-weights // CHUNK)
    return philox(counters(place.first_group, chunks, step, stream), place.seed, place.rounds)
