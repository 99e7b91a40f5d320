"""Held-out windows choose the mask, other held-out windows confirm that it is better than the initial one.

The selection windows are split in two halves. The learner looks at the first half now and then and keeps the greedy
mask with the lowest loss. At the end the second half, not looked at before, must say that this mask is better than
the initial one: the one-sided 95 % bound of the paired difference must not be above zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

import nmbench

ONE_SIDED_95 = 1.645  # standard errors


class Watch:
    """Keeps the best greedy mask of a learner; `notes` tells the record what it saw."""

    def __init__(self, task: nmbench.LearnTask, live: Any) -> None:
        half = len(task.selection) // 2
        self.task = task
        self.live = live
        self.looked_at, self.unseen = task.selection[:half], task.selection[half:]
        if half < 2:
            raise nmbench.NMBenchError(f"{task.who} needs at least 4 selection windows; raise --selection-tokens.")
        self.best = {name: mask.clone() for name, mask in task.initial.items()}
        self.best_step = 0
        self.curve: list[tuple[int, float]] = []
        self.notes: dict[str, Any] = {}

    def look(self, step: int, masks: Mapping[str, Tensor]) -> float:
        """Measure a greedy mask on the first half, and keep it if it is the best so far; returns its mean loss."""
        if not self.curve:
            self.curve.append((0, float(self.losses(self.task.initial, self.looked_at).mean())))
        loss = float(self.losses(masks, self.looked_at).mean())
        if loss < min(value for _, value in self.curve):
            self.best, self.best_step = {name: mask.clone() for name, mask in masks.items()}, step
        self.curve.append((step, loss))
        self.task.report(step, masks=masks, held_out=loss, gained=self.curve[0][1] - min(v for _, v in self.curve))
        return loss

    def verdict(self, masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The best mask if the unseen half confirms it, else the initial one."""
        with self.task.masked_weights() as self.live:
            difference = self.losses(self.best, self.unseen) - self.losses(self.task.initial, self.unseen)
        mean = float(difference.mean())
        bound = mean + ONE_SIDED_95 * float(difference.std()) / math.sqrt(len(difference))
        confirmed = self.best_step > 0 and bound <= 0
        self.notes = {
            "returned": "learnt" if confirmed else "initial",
            "best_step": self.best_step,
            "confirmation": {"nats": mean, "one_sided_95_bound": bound, "windows": len(difference)},
        }
        return self.best if confirmed else self.task.initial

    def losses(self, masks: Mapping[str, Tensor], windows: Tensor) -> Tensor:
        """Per-window losses of the model under `masks`, float64 `[windows]`."""
        self.live.apply(masks)
        return self.task.loss(windows).double()

    def to_save(self) -> dict[str, Any]:
        masks = {f"best {name}": mask for name, mask in self.best.items()}
        return {**masks, "best_step": self.best_step, "curve": self.curve}

    def resume(self, saved: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        if saved:
            self.best = {name: saved[f"best {name}"].to(mask.device) for name, mask in self.best.items()}
            self.best_step, self.curve = saved["best_step"], [(step, loss) for step, loss in saved["curve"]]
