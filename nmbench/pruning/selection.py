"""Held-out windows choose among masks, and other held-out windows confirm the choice.

The lowest of many losses on the same windows is partly luck. So the selection windows are split into two halves. By the
first half a learner keeps the best of its masks. The second half is read only at the end, where the best mask must not
be worse than the initial mask, within a tolerance, by the one-sided 95 % bound of the paired difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from nmbench.comparison import Confirmation, not_worse
from nmbench.errors import NMBenchError
from nmbench.results.files import pack, unpack

if TYPE_CHECKING:
    from nmbench.pruning.learning import LearnTask

M = TypeVar("M", bound=Mapping[str, Tensor])  # masks, however a learner keeps them


def halves(selection: Tensor, who: str) -> tuple[Tensor, Tensor]:
    """Return the windows to choose by, and those to confirm the choice by: `[n, window_tokens]` each.

    Raises `NMBenchError` unless each half has two windows: one difference has no interval.
    """
    half = len(selection) // 2
    if half < 2:
        raise NMBenchError(f"{who} needs at least 4 selection windows; raise --selection-tokens.")
    return selection[:half], selection[half:]


class Selection(Generic[M]):
    """The best masks of one learner so far, by the selection windows of its task.

    `looked_at` and `unseen`: int64 `[n, window_tokens]`. `best`: the best masks, which were passed to `look`
    at step `best_at` (0: the initial masks), with `best_losses` float64 `[n]` on the first half. `confirmation`: the
    result of `verdict` on the second half; None before, and if the initial masks are best and need no confirmation.

    Raises `NMBenchError` unless each half has two windows.
    """

    def __init__(self, task: LearnTask, initial: M, tolerance_nats: float) -> None:
        self.looked_at, self.unseen = halves(task.selection, task.who)
        self.best = self.initial = initial
        self.tolerance_nats = tolerance_nats
        self.who = task.who
        self.best_at = 0
        self.best_losses = torch.zeros(0, dtype=torch.float64)
        self.confirmation: Confirmation | None = None

    def start(self, losses: Tensor) -> None:
        """Store the losses `[n]` of the initial masks on the windows `looked_at`."""
        self.best_losses = losses.double().cpu()

    def look(self, at: int, masks: M, losses: Tensor) -> None:
        """Keep `masks` if the mean of `losses` `[n]`, on the windows `looked_at`, is the lowest so far; NaN never is.

        Raises `NMBenchError` before `start`, because the losses of the initial masks are still unknown.
        """
        if not len(self.best_losses):
            raise NMBenchError(f"{self.who} calls Selection.look before Selection.start; measure the start first.")
        losses = losses.double().cpu()
        if float(losses.mean()) < float(self.best_losses.mean()):
            self.best, self.best_at, self.best_losses = masks, at, losses

    def verdict(self, measure: Callable[[Tensor, M], Tensor]) -> M:
        """Return the best masks if the unseen half confirms them, else the initial masks.

        `measure(windows, masks)` returns the losses `[n]` of the model under `masks`.
        """
        if not self.best_at:
            return self.initial
        losses, reference = measure(self.unseen, self.best), measure(self.unseen, self.initial)
        self.confirmation = not_worse(losses, reference, self.tolerance_nats)
        return self.best if self.confirmation.holds else self.initial

    def state(self) -> dict[str, Any]:
        """The selection so far, for a checkpoint: the best masks packed to bits, their step and their losses."""
        best = {name: pack(mask) for name, mask in self.best.items()} if self.best_at else {}
        return {"best": best, "best_at": self.best_at, "best_losses": self.best_losses}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`; the best masks are bool masks `[out, in]` where the initial masks are."""
        self.best_at, self.best_losses = state["best_at"], state["best_losses"]
        packed = state["best"]
        unpacked = {
            name: unpack(packed[name].to(mask.device), tuple(mask.shape))
            for name, mask in self.initial.items()
            if packed
        }
        self.best = cast(M, unpacked) if packed else self.initial

    @property
    def confirmed(self) -> bool:
        """True if `verdict` returned other masks than the initial ones."""
        return self.confirmation is not None and self.confirmation.holds

    def notes(self, found: str = "learnt") -> dict[str, Any]:
        """The notes of a record on the verdict: which masks it returned, `found` or the initial ones, and why."""
        confirmation = asdict(self.confirmation) if self.confirmation else None
        return {"returned": found if self.confirmed else "initial", "confirmation": confirmation}
