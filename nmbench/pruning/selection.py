"""Held-out windows choose among masks, and other held-out windows confirm the choice.

The lowest of many losses on the same windows is low by luck as well. So the selection windows are split in two halves:
by the first a learner keeps the best of the masks it has seen, the second is not looked at before the end, and there
the best one must not be worse than the initial one, within a tolerance, by the one-sided 95 % bound of their paired
difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from nmbench.errors import NMBenchError
from nmbench.evaluation.comparison import Confirmation, not_worse

if TYPE_CHECKING:
    from nmbench.pruning.learning import LearnTask

M = TypeVar("M", bound=Mapping[str, Tensor])  # masks, however a learner keeps them


class Selection(Generic[M]):
    """The best masks of one learner so far, by the selection windows of its task.

    `looked_at` and `unseen`: int64 `[n, window_tokens]`. `best`: the masks that were best at look `best_at`, 0 for the
    initial ones, with `best_losses` float64 `[n]` on the first half. `confirmation`: what the second half said of them,
    once `verdict` has asked; None if the initial masks are the best, which need no confirmation.

    Raises `NMBenchError` unless each half has two windows.
    """

    def __init__(self, task: LearnTask, initial: M, tolerance_nats: float) -> None:
        half = len(task.selection) // 2
        if half < 2:
            raise NMBenchError(f"{task.who} needs at least 4 selection windows; raise --selection-tokens.")
        self.looked_at, self.unseen = task.selection[:half], task.selection[half:]
        self.best = self.initial = initial
        self.tolerance_nats = tolerance_nats
        self.who = task.who
        self.best_at = 0
        self.best_losses = torch.zeros(0, dtype=torch.float64)
        self.confirmation: Confirmation | None = None

    def start(self, losses: Tensor) -> None:
        """Take down the losses `[n]` of the initial masks on the windows `looked_at`."""
        self.best_losses = losses.double().cpu()

    def look(self, at: int, masks: M, losses: Tensor) -> None:
        """Keep `masks`, whose losses on the windows `looked_at` are `[n]`, if none had a lower mean; NaN never has.

        Raises `NMBenchError` before `start`, because there is no loss of the initial masks to compare with.
        """
        if not len(self.best_losses):
            raise NMBenchError(f"{self.who} calls Selection.look before Selection.start; measure the start first.")
        losses = losses.double().cpu()
        if float(losses.mean()) < float(self.best_losses.mean()):
            self.best, self.best_at, self.best_losses = masks, at, losses

    def verdict(self, measure: Callable[[Tensor, M], Tensor]) -> M:
        """The best masks if the unseen half confirms them, else the initial ones; `measure(windows, masks)` gives the
        losses `[n]` of the model with these masks.
        """
        if not self.best_at:
            return self.initial
        losses, reference = measure(self.unseen, self.best), measure(self.unseen, self.initial)
        self.confirmation = not_worse(losses, reference, self.tolerance_nats)
        return self.best if self.confirmation.holds else self.initial

    @property
    def confirmed(self) -> bool:
        """Whether the verdict was that the learner returns other masks than the initial ones."""
        return self.confirmation is not None and self.confirmation.holds
