"""Sweeps over the groups of a layer, many rows at once."""

from __future__ import annotations

import torch
from torch import Tensor

from nmbench_plugins.swaps.choosers import chooser_of
from nmbench_plugins.swaps.problem import Problem

BLOCK_COLUMNS = 128  # swept before the later ones are updated at once
MOST_PAIRS = 2**28  # of weights of one group, in the rows that are swept together


def descend(problem: Problem, dropped: Tensor, sweeps: int, most_pairs: int = MOST_PAIRS) -> tuple[Tensor, int]:
    """Sweep each row until nothing changes, at most `sweeps` times.

    `dropped`: float `[in, out]`, 1 where a weight is dropped. So many rows are swept together that the pairs of one
    group in these rows are at most `most_pairs`, which bounds the memory. Returns the new `dropped` and the number of
    sweeps.
    """
    dropped, most = dropped.clone(), 0
    rows = max(most_pairs // problem.pattern.group**2, 1)
    for active in torch.arange(dropped.shape[1], device=dropped.device).split(rows):
        used = 0
        while len(active) and used < sweeps:
            before = dropped.index_select(1, active)
            after = sweep(problem.rows(active), before)
            dropped.index_copy_(1, active, after)
            active, used = active[(after != before).any(dim=0)], used + 1  # the only line that waits for the device
        most = max(most, used)
    return dropped, most


def sweep(problem: Problem, dropped: Tensor, block_columns: int = BLOCK_COLUMNS) -> Tensor:
    """Choose the pattern of every group once, from left to right; return the new `dropped` `[in, out]`."""
    dropped = dropped.clone()
    pull = torch.addmm(problem.linear, problem.others, problem.weight * dropped)  # [in, out], p of every group
    width = max(block_columns // problem.pattern.group, 1) * problem.pattern.group  # whole groups only
    for start in range(0, len(dropped), width):
        block = slice(start, start + width)
        restored = sweep_block(problem, pull[block], dropped[block], block)
        pull[block.stop :].addmm_(problem.others[block.stop :, block], restored, alpha=-1)
    return dropped


def sweep_block(problem: Problem, pull: Tensor, dropped: Tensor, block: slice) -> Tensor:
    """Sweep one block of columns, `pull` and `dropped` in place; return the decrease of e, `[columns, out]`."""
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
