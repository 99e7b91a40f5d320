"""From the losses of a step to the size of its update, computed on the model's device: no step waits for the host.

    r = mean(losses - references),   delta <- decay * delta + (1 - decay) * r,   scale = -lr * (r - delta)

With `normalise`, r - delta is divided by its running spread, the root of a mean square that decays like delta and is
corrected for starting at 0, as in Adam. From the first loss that is not finite on, the scale is 0: no logit changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """The rule of an update: logits start at `prior` times the initial mask; the others turn residuals into steps."""

    learning_rate: float
    prior: float
    decay: float
    normalise: bool


class Figures(NamedTuple):
    """The scalars, read back to the host. `broken`: the first step whose loss was not finite, or None."""

    step: int
    residual: float
    baseline: float
    spread: float
    learning_rate: float
    broken: int | None


class Tracker:
    """The scalars of a run as tensors of one element, changed in place so that a CUDA graph can hold the tensors."""

    def __init__(self, rule: Rule, device: torch.device) -> None:
        self.rule = rule
        self.device = device
        # No Python number below becomes a tensor of its own: copying one to the device would break a CUDA graph.
        self.step = self._integer(0)  # steps done
        self.tracked = self._integer(0)  # residuals since the last restart
        self.broken = self._integer(-1)
        self.residual, self.baseline, self.mean_square = (self._float(0.0) for _ in range(3))
        self.learning_rate = self._float(rule.learning_rate)
        self.scale = torch.zeros(1, device=device)  # float32, factor of the update that is due
        self._zero = self._float(0.0)
        self._log_decay = math.log(rule.decay) if rule.decay else -math.inf

    def take(self, losses: Tensor, references: Tensor) -> None:
        """Count a step with losses `[n]` against `references` `[n]`, and set `scale` for its update."""
        residual = (losses - references).mean().double().view(1)
        sound = self._count(residual)
        decay = self.rule.decay
        baseline = decay * self.baseline + (1 - decay) * residual
        advantage = residual - baseline
        mean_square = decay * self.mean_square + (1 - decay) * advantage.square()
        if self.rule.normalise:
            corrected = mean_square / -(self.tracked.double() * self._log_decay).expm1()  # 1 - decay^tracked
            advantage = torch.where(corrected > 0, advantage / corrected.sqrt(), self._zero)
        self.baseline.copy_(torch.where(sound, baseline, self.baseline))
        self.mean_square.copy_(torch.where(sound, mean_square, self.mean_square))
        self.scale.copy_(torch.where(sound, -self.learning_rate * advantage, self._zero))

    def restart(self, learning_rate: float) -> None:
        """Forget the residuals, and go on with another step size."""
        for tensor in (self.tracked, self.baseline, self.mean_square, self.scale):
            tensor.zero_()
        self.learning_rate.fill_(learning_rate)

    def figures(self) -> Figures:
        """Return the scalars; the host waits for the device."""
        values = (self.step, self.residual, self.baseline, self.mean_square, self.learning_rate, self.broken)
        step, residual, baseline, mean_square, learning_rate, broken = torch.cat([v.double() for v in values]).tolist()
        first = int(broken) if broken >= 0 else None
        return Figures(int(step), residual, baseline, math.sqrt(mean_square), learning_rate, first)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that steps change, by name, not copies."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor) and name[0] != "_"}

    def to_save(self) -> dict[str, Any]:
        return {name: value.item() for name, value in self.tensors().items() if name != "scale"}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restore a state from `to_save`, in which no update is due."""
        self.scale.zero_()
        for name in self.to_save():
            getattr(self, name).fill_(saved[name])

    def _count(self, residual: Tensor) -> Tensor:
        """Count a step with a mean residual float64 `[1]`; return bool `[1]`: all residuals so far were finite."""
        sound = residual.isfinite() & (self.broken < 0)
        self.step += 1
        self.tracked += 1
        self.broken.copy_(torch.where(sound | (self.broken >= 0), self.broken, self.step))
        self.residual.copy_(torch.where(sound | (self.broken == self.step), residual, self.residual))
        return sound

    def _float(self, value: float) -> Tensor:
        return torch.full((1,), value, dtype=torch.float64, device=self.device)

    def _integer(self, value: int) -> Tensor:
        return torch.full((1,), value, dtype=torch.int64, device=self.device)
