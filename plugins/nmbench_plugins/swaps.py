"""Swaps: exact refinement of a mask inside its groups, on frozen weights, from the Gram matrix of the layer's inputs.

Related: SparseSwaps (arXiv 2512.10922). For one output row w let e be its pruned part (w where dropped, else 0), X the
inputs and Y those in the dense model, H = X^T X and D = (Y - X)^T X. The distance of the row's outputs from a target
between X w (a = 0) and Y w (a = 1) is up to a constant

    |X e + a (Y - X) w|^2  =  e H e^T + 2 a w D e^T.

With everything outside a group g fixed, r = (e H + a w D)_g - e_g H_gg, the part c of g that is dropped costs
c H_gg c^T + 2 c r, so that the best of the C(M, N) patterns is found by looking at all of them. Groups are swept from
left to right, all rows at once, e H following every change, until nothing changes. The error never rises.

Where a group has too many patterns, the best exchange of one kept and one dropped weight is made instead:
dropping k costs w_k^2 H_kk + 2 w_k t_k, restoring d costs w_d^2 H_dd - 2 w_d t_d, both together - 2 w_k w_d H_kd more,
where t = (e H + a w D)_g.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

import nmbench

MOST_PATTERNS = 128  # of a group; beyond it, swaps
BLOCK_COLUMNS = 128  # swept before the later ones are updated at once
MOST_PAIRS = 2**28  # of weights of one group, in the rows that are swept together
EPSILON = torch.finfo(torch.float32).eps
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Swaps(nmbench.Refiner):
    """Choose the best pattern of each group given all others, again and again; weights stay as they are."""

    sweeps: int = nmbench.option(10, "most sweeps over the groups of a layer; ends earlier when nothing changes")
    dense_weight: float = nmbench.option(
        0.75, "aim at the layer's outputs on pruned inputs (0), in the dense model (1), or between"
    )
    sequential: bool = nmbench.option(
        True, "look at the inputs of a layer when the layers before it in its block are pruned"
    )

    def __post_init__(self) -> None:
        if self.sweeps < 1 or not 0 <= self.dense_weight <= 1:
            raise nmbench.NMBenchError("swaps needs sweeps >= 1 and dense_weight from 0 to 1.")

    @property
    def needs(self) -> nmbench.Stat:
        return nmbench.Stat.GRAM | (nmbench.Stat.DRIFT if self.dense_weight else nmbench.Stat.NONE)

    def refine(
        self, weight: Tensor, stats: nmbench.LayerStats, mask: Tensor, pattern: nmbench.Pattern
    ) -> nmbench.Pruned:
        assert stats.gram is not None
        drift = None
        if self.dense_weight:
            assert stats.drift is not None
            drift = self.dense_weight * stats.drift
        problem = Problem.of(weight, stats.gram, drift, pattern)
        dropped = (~mask).t().float().contiguous()  # [in, out]
        before = problem.error(dropped)
        refined, used = descend(problem, dropped, self.sweeps)
        changed = (refined != dropped).unflatten(0, (-1, pattern.group)).any(dim=1).float().mean()
        fall = (before - problem.error(refined)) / problem.pruned_error(dropped).clamp_min(TINY)
        figures = {"error_fall": float(fall), "groups_changed": float(changed), "sweeps": float(used)}
        return nmbench.Pruned((refined == 0).t().contiguous(), figures=figures)


@dataclass(frozen=True)
class Problem:
    """Rows of a layer, columns first and scaled so that nothing overflows; float32.

    `gram` `[in, in]`, H; `others` `[in, in]`, H with H_gg = 0 for every group g; `weight` `[in, out]`; `linear`
    `[in, out]`, the transpose of a w D; `noise` `[in, out]`, how far rounding may move a weight's part of the error;
    `scale` `[out]`, what the rows were divided by, relative to the largest.
    """

    gram: Tensor
    others: Tensor
    weight: Tensor
    linear: Tensor
    noise: Tensor
    scale: Tensor
    pattern: nmbench.Pattern

    @classmethod
    def of(cls, weight: Tensor, gram: Tensor, drift: Tensor | None, pattern: nmbench.Pattern) -> Problem:
        rows = weight.float()
        scale = rows.abs().amax(dim=1).clamp_min(TINY)  # [out]
        rows = rows / scale[:, None]
        largest = gram.diagonal().amax().clamp_min(TINY)
        gram = gram / largest
        others = gram.clone()
        own_blocks(others, pattern.group).zero_()
        linear = torch.zeros_like(rows) if drift is None else rows @ (drift / largest)
        reach = rows.abs() * gram.diagonal().sqrt()  # [out, in]
        noise = EPSILON * (reach * reach.sum(dim=1, keepdim=True) + (rows * linear).abs()) + TINY
        columns, linear, noise = (tensor.t().contiguous() for tensor in (rows, linear, noise))
        return cls(gram, others, columns, linear, noise, scale / scale.amax(), pattern)

    def rows(self, index: Tensor) -> Problem:
        """The same for some of the rows."""
        weight, linear, noise = (tensor.index_select(1, index) for tensor in (self.weight, self.linear, self.noise))
        return Problem(self.gram, self.others, weight, linear, noise, self.scale[index], self.pattern)

    def pruned_error(self, dropped: Tensor) -> Tensor:
        """The sum over rows of e H e^T; `dropped` float `[in, out]`, 1 where a weight is dropped."""
        e = self.weight * dropped
        return ((e * (self.gram @ e)).sum(dim=0) * self.scale.square()).sum()

    def error(self, dropped: Tensor) -> Tensor:
        """The sum over rows of e H e^T + 2 a w D e^T."""
        linear = (2 * self.weight * dropped * self.linear).sum(dim=0)
        return self.pruned_error(dropped) + (linear * self.scale.square()).sum()


def own_blocks(gram: Tensor, group: int) -> Tensor:
    """A view `[group, group, groups]` of the blocks H_gg."""
    groups = len(gram) // group
    return gram.view(groups, group, groups, group).diagonal(dim1=0, dim2=2)


def descend(problem: Problem, dropped: Tensor, sweeps: int) -> tuple[Tensor, int]:
    """Sweep until nothing changes, at most `sweeps` times; a row in which nothing changes is done.

    Returns what is dropped then and how many sweeps were made.
    """
    dropped, most = dropped.clone(), 0
    for active in torch.arange(dropped.shape[1], device=dropped.device).split(rows_at_once(problem.pattern)):
        used = 0
        while len(active) and used < sweeps:
            before = dropped.index_select(1, active)
            after = sweep(problem.rows(active), before)
            dropped.index_copy_(1, active, after)
            active, used = active[(after != before).any(dim=0)], used + 1  # the one place that waits for the device
        most = max(most, used)
    return dropped, most


def rows_at_once(pattern: nmbench.Pattern) -> int:
    """How many rows are swept together: all, unless groups are so large that their pairs would fill the memory."""
    return max(MOST_PAIRS // pattern.group**2, 1)


def sweep(problem: Problem, dropped: Tensor, block_columns: int = BLOCK_COLUMNS) -> Tensor:
    """Choose the pattern of every group once, from left to right; returns what is dropped then."""
    dropped = dropped.clone()
    pull = torch.addmm(problem.linear, problem.others, problem.weight * dropped)  # [in, out], r of every group
    width = max(block_columns // problem.pattern.group, 1) * problem.pattern.group  # whole groups only
    for start in range(0, len(dropped), width):
        block = slice(start, start + width)
        restored = sweep_block(problem, pull[block], dropped[block], block)
        pull[block.stop :].addmm_(problem.others[block.stop :, block], restored, alpha=-1)
    return dropped


def sweep_block(problem: Problem, pull: Tensor, dropped: Tensor, block: slice) -> Tensor:
    """Sweep one block of columns, `pull` and `dropped` in place; returns by how much e fell, `[columns, out]`."""
    size = problem.pattern.group
    weight, others = problem.weight[block], problem.others[block, block]
    before = weight * dropped
    restored = torch.empty_like(before)
    chooser = chooser_of(problem.pattern)(problem, dropped, block)
    for number, start in enumerate(range(0, len(dropped), size)):
        group = slice(start, start + size)
        chooser.choose(number, pull[group], dropped[group])
        torch.addcmul(before[group], weight[group], dropped[group], value=-1, out=restored[group])
        pull[group.stop :].addmm_(others[group.stop :, group], restored[group], alpha=-1)
    return restored


class Chooser(Protocol):
    """Chooses the pattern of one group after the other, in one block of columns."""

    def choose(self, number: int, pull: Tensor, dropped: Tensor) -> None:
        """Write what is best to drop in group `number` to `dropped` `[group, out]`, given its r, `[group, out]`."""


def chooser_of(pattern: nmbench.Pattern) -> type[AllPatterns | Exchange]:
    return AllPatterns if math.comb(pattern.group, pattern.keep) <= MOST_PATTERNS else Exchange


class AllPatterns:
    """Compares all patterns of a group."""

    def __init__(self, problem: Problem, dropped: Tensor, block: slice) -> None:
        size = problem.pattern.group
        weight = problem.weight[block].unflatten(0, (-1, size))  # [groups, group, out]
        gram = own_blocks(problem.gram[block, block].contiguous(), size)  # [group, group, groups]
        self.table, self.columns, pairs, first, second = tables(problem.pattern, weight.device)
        own = weight.square() * gram.diagonal().unsqueeze(2)
        both = 2 * weight[:, first] * weight[:, second] * gram[first, second].t().unsqueeze(2)  # [groups, pairs, out]
        self.fixed = self.table @ own + pairs @ both  # [groups, patterns, out], the cost if r were 0
        self.twice = 2 * weight
        now = (self.table @ dropped.unflatten(0, (-1, size))).max(dim=1, keepdim=True).indices  # [groups, 1, out]
        noise = problem.noise[block].unflatten(0, (-1, size)).sum(dim=1, keepdim=True)
        self.fixed.scatter_add_(1, now, -noise)  # others must be better beyond rounding

    def choose(self, number: int, pull: Tensor, dropped: Tensor) -> None:
        cost = torch.addmm(self.fixed[number], self.table, self.twice[number] * pull)  # [patterns, out]
        torch.index_select(self.columns, 1, cost.min(dim=0).indices, out=dropped)


@functools.cache
def tables(pattern: nmbench.Pattern, device: torch.device) -> tuple[Tensor, ...]:
    """What the patterns of a group drop: float `[patterns, group]`, 1 where dropped, its transpose, and the same for
    pairs, `[patterns, pairs]`, with the two members of each pair. Made once, so that nothing waits for a copy.
    """
    size = pattern.group
    chosen = torch.tensor(list(itertools.combinations(range(size), size - pattern.keep)))  # [patterns, dropped]
    table = torch.zeros(len(chosen), size).scatter_(1, chosen, 1.0)
    first, second = torch.triu_indices(size, size, 1)
    pairs = table[:, first] * table[:, second]
    return tuple(tensor.to(device) for tensor in (table, table.t().contiguous(), pairs, first, second))


class Exchange:
    """Exchanges the best pair of a kept and a dropped weight of a group."""

    def __init__(self, problem: Problem, dropped: Tensor, block: slice) -> None:
        size = problem.pattern.group
        self.weight = problem.weight[block].unflatten(0, (-1, size))  # [groups, group, out]
        self.gram = own_blocks(problem.gram[block, block].contiguous(), size).permute(2, 0, 1)  # [groups, group, group]
        self.noise = problem.noise[block].unflatten(0, (-1, size)).sum(dim=1)  # [groups, out]

    def choose(self, number: int, pull: Tensor, dropped: Tensor) -> None:
        weight, gram = self.weight[number], self.gram[number]
        slope = 2 * weight * torch.addmm(pull, gram, weight * dropped)  # [group, out]
        own = weight.square() * gram.diagonal()[:, None]
        drop = (own + slope).masked_fill(dropped == 1, torch.inf)
        restore = (own - slope).masked_fill(dropped == 0, torch.inf)
        both = weight[:, None] * weight * (2 * gram[:, :, None])  # [dropped now, restored now, out]
        change, pair = (drop[:, None] + restore - both).flatten(0, 1).min(dim=0)
        better = (change < -self.noise[number]).float()[None]
        dropped.scatter_(0, (pair // len(gram))[None], better)
        dropped.scatter_(0, (pair % len(gram))[None], 1 - better)


@nmbench.hookimpl
def nmbench_register_baselines(register: nmbench.Register) -> None:
    register("swaps", Swaps)
