"""The choice of the pattern of one group, other groups fixed: the best of all patterns, or the best exchange."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Protocol

import torch
from torch import Tensor

import nmbench
from nmbench_plugins.swaps.problem import Problem, own_blocks

MOST_PATTERNS = 128  # of a group; a group with more is changed by exchanges of two units, which mostly are weights


class Chooser(Protocol):
    """Chooses the pattern of one group after the other, in one block of columns."""

    def choose(self, number: int, pull: Tensor, dropped: Tensor) -> None:
        """Set `dropped` `[group, out]` of group `number` to the best pattern, 1 where dropped; `pull` is its p."""


def chooser_of(pattern: nmbench.Pattern) -> type[AllPatterns | Exchange]:
    """Return the chooser for groups of this pattern."""
    return AllPatterns if math.comb(pattern.units.group, pattern.units.keep) <= MOST_PATTERNS else Exchange


class AllPatterns:
    """Compares all patterns of a group."""

    def __init__(self, problem: Problem, dropped: Tensor, block: slice) -> None:
        size = problem.pattern.group
        weight = problem.weight[block].unflatten(0, (-1, size))  # [groups, group, out]
        gram = own_blocks(problem.gram[block, block].contiguous(), size)  # [group, group, groups]
        self.table, self.columns, pairs, first, second = tables(problem.pattern, weight.device)
        own = weight.square() * gram.diagonal().unsqueeze(2)
        both = 2 * weight[:, first] * weight[:, second] * gram[first, second].t().unsqueeze(2)  # [groups, pairs, out]
        self.fixed = self.table @ own + pairs @ both  # [groups, patterns, out], the cost if p were 0
        self.twice = 2 * weight
        now = (self.table @ dropped.unflatten(0, (-1, size))).max(dim=1, keepdim=True).indices  # [groups, 1, out]
        noise = problem.noise[block].unflatten(0, (-1, size)).sum(dim=1, keepdim=True)
        self.fixed.scatter_add_(1, now, -noise)  # another pattern must be better by more than rounding

    def choose(self, number: int, pull: Tensor, dropped: Tensor) -> None:
        cost = torch.addmm(self.fixed[number], self.table, self.twice[number] * pull)  # [patterns, out]
        torch.index_select(self.columns, 1, cost.min(dim=0).indices, out=dropped)


@functools.cache
def tables(pattern: nmbench.Pattern, device: torch.device) -> tuple[Tensor, ...]:
    """Return tables of the weights, and of the pairs of weights, that each pattern of a group drops.

    Float `[patterns, group]`, 1 where dropped; its transpose; float `[patterns, pairs]`, 1 where both are dropped; and
    the first and second members of the pairs, int64 `[pairs]`. The tables are cached, so that no sweep waits for a
    copy.
    """
    size, units = pattern.group, pattern.units
    chosen = torch.tensor(list(itertools.combinations(range(units.group), units.group - units.keep)))
    table = pattern.whole(torch.zeros(len(chosen), units.group).scatter_(1, chosen, 1.0))  # [patterns, group]
    first, second = torch.triu_indices(size, size, 1)
    pairs = table[:, first] * table[:, second]
    return tuple(tensor.to(device) for tensor in (table, table.t().contiguous(), pairs, first, second))


class Exchange:
    """Exchanges the best pair of a kept and a dropped unit of a group."""

    def __init__(self, problem: Problem, dropped: Tensor, block: slice) -> None:
        size = problem.pattern.group
        self.weight = problem.weight[block].unflatten(0, (-1, size))  # [groups, group, out]
        self.gram = own_blocks(problem.gram[block, block].contiguous(), size).permute(2, 0, 1)  # [groups, group, group]
        self.noise = problem.noise[block].unflatten(0, (-1, size)).sum(dim=1)  # [groups, out]
        self.unit = problem.pattern.unit

    def choose(self, number: int, pull: Tensor, dropped: Tensor) -> None:
        weight, gram = self.weight[number], self.gram[number]
        slope = 2 * weight * torch.addmm(pull, gram, weight * dropped)  # [group, out]
        both = weight[:, None] * weight * (2 * gram[:, :, None])  # [group, group, out]
        if self.unit > 1:
            slope = slope.unflatten(0, (-1, self.unit)).sum(dim=1)  # [units, out]
            both = both.unflatten(0, (-1, self.unit)).sum(dim=1).unflatten(1, (-1, self.unit)).sum(dim=2)
        own = both.diagonal().t() / 2  # [units, out]
        out = dropped[:: self.unit]  # [units, out]
        drop = (own + slope).masked_fill(out == 1, torch.inf)
        restore = (own - slope).masked_fill(out == 0, torch.inf)
        change, pair = (drop[:, None] + restore - both).flatten(0, 1).min(dim=0)  # of [dropped now, restored now, out]
        better = (change < -self.noise[number]).float()[None]
        for unit, value in ((pair // len(own), better), (pair % len(own), 1 - better)):
            for member in range(self.unit):
                dropped.scatter_(0, (unit * self.unit + member)[None], value)
