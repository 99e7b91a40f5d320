"""Losses of sequences that each have flips of their own: y = x W + x dW_s, for a whole minibatch in one pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import nmbench
from nmbench.evaluation import window_losses
from nmbench_plugins.swaps.evidence import watching


class Effects(NamedTuple):
    """The effect of the flips of each unit on the loss, and its standard error: float64 `[layers, units]`."""

    mean: Tensor
    error: Tensor

    @property
    def ratio(self) -> Tensor:
        """The effect in standard errors; 0 where every difference is 0."""
        return torch.where((self.mean == 0) & (self.error == 0), self.mean, self.mean / self.error)


def of_rows(units: Tensor, rows: int) -> Tensor:
    """Return values by unit `[..., units]` as values by row `[..., rows]`: units are blocks of rows, all but equal."""
    return units[..., torch.arange(rows, device=units.device) * units.shape[-1] // rows]


@contextlib.contextmanager
def flipped(task: nmbench.LearnTask, changes: Mapping[str, Tensor], chosen: Tensor) -> Iterator[None]:
    """While the context is open, sequence s of a minibatch computes with W + dW_s.

    `changes`: layer -> dW `[out, in]`. `chosen` bool `[sequences, layers, units]`: whether dW_s has the rows of a unit
    of dW; its other rows are zero.
    """
    index = {name: number for number, name in enumerate(changes)}

    def add(name: str, inputs: Tensor, output: Tensor) -> Tensor:
        rows = of_rows(chosen[:, index[name]], output.shape[-1]).unsqueeze(1)  # [sequences, 1, out]
        return output + F.linear(inputs, changes[name]) * rows

    with watching(task, list(changes), add):
        yield


def mixed_losses(
    task: nmbench.LearnTask, changes: Mapping[str, Tensor], chosen: Tensor, tokens: Tensor, minibatch: int
) -> Tensor:
    """Return the loss of each sequence of `tokens` int64 `[n, window]` under its own flips, float64 `[n]`."""
    task.count_forward(tokens.numel())
    losses = []
    for part, own in zip(tokens.split(minibatch), chosen.split(minibatch), strict=True):
        with flipped(task, changes, own):
            losses.append(window_losses(task.model, part).double())
    return torch.cat(losses)


def effects(
    task: nmbench.LearnTask, changes: Mapping[str, Tensor], units: int, tokens: Tensor, minibatch: int
) -> Effects:
    """Return the effects of the flips `changes` by unit, from one pair of passes of `tokens` int64 `[n, window]`.

    Sequence s has a random half of the units in one pass and the other half in the other pass. A unit's effect is the
    mean of the difference of both losses, signed by the pass in which s had the unit.
    """
    shape = (len(tokens), len(changes), units)
    chosen = torch.rand(shape, generator=task.generator, device=tokens.device) < 0.5
    first, second = (mixed_losses(task, changes, own, tokens, minibatch) for own in (chosen, ~chosen))
    rewards = (first - second)[:, None, None] * (2.0 * chosen - 1.0)  # [n, layers, units]
    deviation = rewards.std(dim=0) if len(tokens) > 1 else rewards[0] * torch.nan  # one sequence says nothing of it
    return Effects(rewards.mean(dim=0), deviation / len(tokens) ** 0.5)
