"""From the losses of a step to the size of the update of every output row, on the model's device.

Window s computed row o with mask A or B, as its coin c[s, o] = +1 or -1 says. With r_s = loss_s - reference_s,

    a_s   = (r_s - mean r) / std r                 all 0 if std r is 0
    R_o   = sum over s of a_s c[s, o] / sqrt(windows)
    scale = -lr * (1 - step / steps) * R_o         for grad log P(A) - grad log P(B), with steps done before this one

The coins of a row are fair and independent of all that does not depend on the row's mask, and sum a_s^2 = windows:
where the row makes no difference to the loss, R_o has mean 0 and variance 1, for every number of windows and rows.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

import nmbench
from nmbench_plugins.maskpro.coins import toss
from nmbench_plugins.maskpro.tracker import Scalars, Start


@dataclass(frozen=True)
class PairRule(Start):
    """`fades_over`: the steps over which the learning rate falls to 0 in a straight line; None: it stays."""

    fades_over: int | None = None

    def tracker(self, task: nmbench.LearnTask) -> PairTracker:
        return PairTracker(self, task)


class PairTracker(Scalars):
    """Tosses the coins of a step and weighs them by what the windows lost.

    `baseline` is the mean of r, `mean_square` its variance in the last minibatch; `learning_rate` is the one before it
    fades.
    """

    def __init__(self, rule: PairRule, task: nmbench.LearnTask) -> None:
        ends = list(itertools.accumulate((rows for rows, _ in task.layers.values()), initial=0))
        super().__init__(rule, task.bundle.device, scales=ends[-1])
        self.rule = rule
        self.seed = task.generator.initial_seed()
        self.rows = {name: slice(*ends[i : i + 2]) for i, name in enumerate(task.layers)}
        self._coins = torch.zeros(0, ends[-1], dtype=torch.bool, device=self.device)

    def toss(self, windows: int) -> Tensor:
        """The coins of the step that begins, bool `[windows, rows of all layers]`: True for mask A."""
        self._coins = toss(self.seed, self.step, windows, self._coins.shape[1])
        return self._coins

    def take(self, losses: Tensor, references: Tensor) -> None:
        residuals = (losses - references).double()  # [windows], r
        mean = residuals.mean().view(1)
        variance = (residuals - mean).square().mean().view(1)
        advantage = torch.where(variance > 0, (residuals - mean) / variance.sqrt(), self._zero)
        signal = advantage.float() @ self._coins.float().mul_(2).sub_(1)  # [rows], sqrt(windows) * R
        rate = self._rate()
        sound = self.count(mean)
        self.baseline.copy_(torch.where(sound, mean, self.baseline))
        self.mean_square.copy_(torch.where(sound, variance, self.mean_square))
        self.scale.copy_(torch.where(sound, signal * (rate / -math.sqrt(len(losses))), self._zero))

    def _rate(self) -> Tensor:
        """The step size of the step that is not counted yet."""
        if self.rule.fades_over is None:
            return self.learning_rate
        return self.learning_rate * (1 - self.step.double() / self.rule.fades_over)
