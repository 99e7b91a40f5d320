"""The losses of the whole model with other weights in one block; the blocks above are computed only once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import nmbench
from nmbench.calibration import resumable, resumed, until
from nmbench.evaluation import standard_error, window_losses


class Judge:
    """Losses of the live model on `windows` int64 `[n, window_tokens]`.

    The weights of the blocks above block `index` must not change while a judge is in use. `minibatch` windows go
    through the model at once. Raises `NumericalFailure` if a loss of the present masks is not finite.
    """

    def __init__(self, task: nmbench.LearnTask, index: int, windows: Tensor, minibatch: int) -> None:
        self.task = task
        self.parts = windows.split(minibatch)
        self.index = index if index and resumable(task.bundle, windows[:1]) else 0  # from which block on it computes
        self.above = [until(task.bundle, self.index - 1, part) if self.index else None for part in self.parts]
        self.count(self.index)
        self.present = self.losses()  # float64 [n], under the present masks
        if not self.present.isfinite().all():
            raise nmbench.NumericalFailure(
                f"{task.who}: the loss of a calibration window is NaN or infinite; another --dtype may help."
            )

    def prefers(self, losses: Tensor, margin: float) -> bool:
        """Return whether losses `[n]` are below the present ones by more than `margin` standard errors; NaN is not."""
        gain = self.present - losses
        return float(gain.mean()) > margin * standard_error(gain)

    def losses(self) -> Tensor:
        """Return the mean cross-entropy of each window in nats, float64 `[n]` on the device."""
        self.count(len(self.task.bundle.blocks) - self.index)
        return torch.cat([self.part(above, tokens) for above, tokens in zip(self.above, self.parts, strict=True)])

    def part(self, above: Any, tokens: Tensor) -> Tensor:
        """Return the losses of one minibatch, from the outputs `above` of the blocks above."""
        if not self.index:
            return window_losses(self.task.model, tokens).double()
        with resumed(self.task.bundle, self.index - 1, above):
            return window_losses(self.task.model, tokens).double()

    def count(self, blocks: int) -> None:
        """Count the tokens of all windows through `blocks` blocks, as a share of a forward pass."""
        tokens = sum(part.numel() for part in self.parts)
        self.task.count_forward(tokens * blocks // len(self.task.bundle.blocks))
