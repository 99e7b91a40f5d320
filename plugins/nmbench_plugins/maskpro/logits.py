"""The logits of all layers, one flat matrix per pattern, so that a step is a handful of large operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import nmbench
from nmbench_plugins.maskpro import policy

GREEDY_GROUPS = 2**20  # sorted at once


@dataclass(frozen=True)
class Drawn:
    """A mask of the whole model: bool `[groups, group]` by pattern, and the same memory as `[out, in]` by layer."""

    by_pattern: Mapping[nmbench.Pattern, Tensor]
    by_layer: Mapping[str, Tensor]


class Logits:
    """float32 logits `[groups, group]` by pattern; layers lie one after the other in the order of the task."""

    def __init__(self, task: nmbench.LearnTask, flat: dict[nmbench.Pattern, Tensor]) -> None:
        self.task = task
        self.flat = flat

    @classmethod
    def prior(cls, task: nmbench.LearnTask, prior: float) -> Logits:
        """`prior` where the initial mask keeps a weight, 0 elsewhere."""
        logits = cls(task, {})
        logits.flat = {p: masks.float().mul_(prior) for p, masks in logits._flattened(task.initial).items()}
        return logits

    def draw(self, generator: torch.Generator) -> Drawn:
        """Draw a mask from the policy."""
        return self._drawn({p: policy.sample(logits, p.keep, generator) for p, logits in self.flat.items()})

    def greedy(self) -> dict[str, Tensor]:
        """The most likely mask: the `keep` largest logits of every group, by layer, in memory of its own."""
        parts = {p: [p.top(part) for part in logits.split(GREEDY_GROUPS)] for p, logits in self.flat.items()}
        return dict(self._drawn({p: torch.cat(masks) for p, masks in parts.items()}).by_layer)

    def log_prob(self, masks: Mapping[str, Tensor]) -> float:
        """Mean over all groups of log P(masks)."""
        flat = self._flattened(masks)
        total = sum(float(policy.log_prob(logits, flat[p]).double().sum()) for p, logits in self.flat.items())
        return total / sum(len(logits) for logits in self.flat.values())

    def step(self, drawn: Drawn, scale: float) -> None:
        """logits += scale * grad log P(drawn)."""
        for pattern, logits in self.flat.items():
            logits.add_(policy.grad_log_prob(logits, drawn.by_pattern[pattern]), alpha=scale)

    def _flattened(self, masks: Mapping[str, Tensor]) -> dict[nmbench.Pattern, Tensor]:
        """The masks of all layers as bool `[groups, group]` by pattern, in the order of the task's layers."""
        parts: dict[nmbench.Pattern, list[Tensor]] = {}
        for name in self.task.layers:
            pattern = self.task.pattern[name]
            parts.setdefault(pattern, []).append(masks[name].reshape(-1, pattern.group))  # [groups of the layer, group]
        return {pattern: torch.cat(layers) for pattern, layers in parts.items()}

    def _drawn(self, masks: dict[nmbench.Pattern, Tensor]) -> Drawn:
        offsets = dict.fromkeys(masks, 0)
        by_layer = {}
        for name, (rows, inputs) in self.task.layers.items():
            pattern = self.task.pattern[name]
            count = rows * inputs // pattern.group
            start = offsets[pattern]
            offsets[pattern] += count
            by_layer[name] = masks[pattern][start : start + count].view(rows, inputs)
        return Drawn(masks, by_layer)

    def to_save(self) -> dict[str, Tensor]:
        return {f"logits {pattern}": logits for pattern, logits in self.flat.items()}

    def load(self, saved: Mapping[str, Any]) -> None:
        for pattern, logits in self.flat.items():
            logits.copy_(saved[f"logits {pattern}"])
