"""Measures other weights of one block by the loss of the whole model; what lies above the block is computed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import nmbench
from nmbench.calibration import resumable, resumed, until
from nmbench.evaluation import standard_error, window_losses


class Judge:
    """Losses of the model as it is now on `windows` int64 `[n, window_tokens]`, as long as the blocks above `index`
    stay as they are; `minibatch` windows go through the model at once. Raises `NumericalFailure` if one is not finite.
    """

    def __init__(self, task: nmbench.LearnTask, index: int, windows: Tensor, minibatch: int) -> None:
        self.task = task
        self.parts = windows.split(minibatch)
        self.index = index if index and resumable(task.bundle, windows[:1]) else 0  # from which block on it computes
        self.above = [until(task.bundle, self.index - 1, part) if self.index else None for part in self.parts]
        self.count(self.index)
        self.present = self.losses()  # float64 [n], under the masks that the model has now
        if not self.present.isfinite().all():
            raise nmbench.NumericalFailure(
                f"{task.who}: the loss of a calibration window is NaN or infinite; another --dtype may help."
            )

    def prefers(self, losses: Tensor, margin: float) -> bool:
        """Whether losses `[n]` are below the present ones by more than `margin` standard errors; NaN never is."""
        gain = self.present - losses
        return float(gain.mean()) > margin * standard_error(gain)

    def losses(self) -> Tensor:
        """Mean cross-entropy of each window in nats, float64 `[n]` on the device."""
        self.count(len(self.task.bundle.blocks) - self.index)
        return torch.cat([self.part(above, tokens) for above, tokens in zip(self.above, self.parts, strict=True)])

    def part(self, above: Any, tokens: Tensor) -> Tensor:
        if not self.index:
            return window_losses(self.task.model, tokens).double()
        with resumed(self.task.bundle, self.index - 1, above):
            return window_losses(self.task.model, tokens).double()

    def count(self, blocks: int) -> None:
        """Count the tokens that went through so many blocks, as a share of the model."""
        tokens = sum(part.numel() for part in self.parts)
        self.task.count_forward(tokens * blocks // len(self.task.bundle.blocks))
