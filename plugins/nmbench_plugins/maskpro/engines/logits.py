"""The logits of all layers as one flat matrix per pattern, so that a step is a handful of large operations.

Where `sequential_cpu` suits a pattern, a draw stores its gradient as well, and the matrix lies in memory column by
column. A group has one logit a unit, which is one weight in most patterns: below, `group` counts units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import nmbench
from nmbench_plugins.maskpro import policy
from nmbench_plugins.maskpro.policy import sequential_cpu
from nmbench_plugins.maskpro.policy.groups import check_logits


@dataclass(frozen=True)
class Drawn:
    """A mask of the whole model: bool `[groups, group]` by pattern, and `[out, in]` by layer.

    Both share memory where units are single weights.
    """

    by_pattern: Mapping[nmbench.Pattern, Tensor]
    by_layer: Mapping[str, Tensor]


class Logits:
    """float32 logits `[groups, group]` by pattern; the layers follow one another in the order of the task."""

    def __init__(self, task: nmbench.LearnTask, flat: dict[nmbench.Pattern, Tensor]) -> None:
        self.task = task
        self.flat = flat
        self.gradients: dict[nmbench.Pattern, Tensor] = {}  # [groups, group], of log P of the last mask drawn

    @classmethod
    def prior(cls, task: nmbench.LearnTask, prior: float) -> Logits:
        """Return logits of `prior` where the initial mask keeps a weight, and 0 elsewhere."""
        logits = cls(task, {})
        for pattern, masks in logits._flattened(task.initial).items():
            flat = masks.float().mul_(prior)
            if sequential_cpu.suits(pattern.units.keep, pattern.units.group, flat.device):
                flat = by_columns(flat)
                logits.gradients[pattern] = torch.empty_like(flat)
            logits.flat[pattern] = flat
        return logits

    def reset(self, masks: Mapping[str, Tensor], prior: float) -> None:
        """Set the logits in place to `prior` where `masks` keep a weight, and to 0 elsewhere."""
        for pattern, flat in self._flattened(masks).items():
            self.flat[pattern].copy_(flat).mul_(prior)

    def draw(self, generator: torch.Generator) -> Drawn:
        """Draw a mask from the policy."""
        return self._drawn({pattern: self._sample(pattern, generator) for pattern in self.flat})

    def greedy(self) -> dict[str, Tensor]:
        """Return the most likely mask by layer, in new memory: the `keep` largest logits of every group."""
        return dict(self._drawn({p: policy.greedy(logits, p.units.keep) for p, logits in self.flat.items()}).by_layer)

    def log_prob(self, masks: Mapping[str, Tensor]) -> float:
        """Return the mean of log P(masks) over all groups."""
        flat = self._flattened(masks)
        total = sum(float(policy.log_prob(logits, flat[p]).double().sum()) for p, logits in self.flat.items())
        return total / sum(len(logits) for logits in self.flat.values())

    def step(self, drawn: Drawn, scale: float) -> None:
        """Add scale * grad log P(drawn) to the logits; `drawn` is the mask of the last call of `draw`."""
        for pattern, logits in self.flat.items():
            gradient = self.gradients.get(pattern)
            if gradient is None:
                gradient = policy.grad_log_prob(logits, drawn.by_pattern[pattern])
            logits.add_(gradient, alpha=scale)

    def _sample(self, pattern: nmbench.Pattern, generator: torch.Generator) -> Tensor:
        logits = self.flat[pattern]
        if pattern not in self.gradients:
            return policy.sample(logits, pattern.units.keep, generator)
        check_logits(logits, pattern.units.keep)
        return sequential_cpu.draw(logits, pattern.units.keep, generator, self.gradients[pattern])

    def _flattened(self, masks: Mapping[str, Tensor]) -> dict[nmbench.Pattern, Tensor]:
        """Return the masks of all layers as bool `[groups, group]` by pattern, in the order of the task's layers."""
        parts: dict[nmbench.Pattern, list[Tensor]] = {}
        for name in self.task.layers:
            pattern = self.task.pattern[name]
            mask = masks[name].to(self.task.bundle.device)[:, :: pattern.unit]  # [out, units]
            parts.setdefault(pattern, []).append(mask.reshape(-1, pattern.units.group))  # [groups of the layer, group]
        return {pattern: torch.cat(layers) for pattern, layers in parts.items()}

    def _drawn(self, masks: dict[nmbench.Pattern, Tensor]) -> Drawn:
        offsets = dict.fromkeys(masks, 0)
        by_layer = {}
        for name, (rows, inputs) in self.task.layers.items():
            pattern = self.task.pattern[name]
            count = rows * inputs // pattern.group
            start = offsets[pattern]
            offsets[pattern] += count
            by_layer[name] = pattern.whole(masks[pattern][start : start + count].view(rows, inputs // pattern.unit))
        return Drawn(masks, by_layer)

    def to_save(self) -> dict[str, Tensor]:
        return {f"logits {pattern}": logits for pattern, logits in self.flat.items()}

    def load(self, saved: Mapping[str, Any]) -> None:
        for pattern, logits in self.flat.items():
            logits.copy_(saved[f"logits {pattern}"])


def by_columns(rows: Tensor) -> Tensor:
    """Return a copy of the matrix `[n, group]` whose memory holds one column after the other."""
    return torch.empty(rows.shape[::-1], dtype=rows.dtype, device=rows.device).t().copy_(rows)
