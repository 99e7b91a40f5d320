"""The engine in vectorised torch: it writes each mask into the live weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

import nmbench
from nmbench.pruning import LiveWeights
from nmbench_plugins.maskpro.engines.base import Engine
from nmbench_plugins.maskpro.engines.logits import Logits
from nmbench_plugins.maskpro.masks import Masks
from nmbench_plugins.maskpro.tracker import Rule


class TorchEngine(Engine):
    """Steps in plain torch, on any device and for every pattern."""

    name = "torch"
    waits = True

    def __init__(self, task: nmbench.LearnTask, live: LiveWeights, rule: Rule, note: str = "") -> None:
        super().__init__(task, live, rule, note)
        self.logits = Logits.prior(task, rule.prior)

    def advance(self, tokens: Tensor, references: Tensor) -> None:
        masks = self.logits.draw(self.task.generator)
        self.live.apply(masks.by_layer)
        self.tracker.take(self.task.shared(tokens, self.task.loss), references)
        self.logits.step(masks, float(self.tracker.scale))

    def greedy(self) -> Masks:
        return self.logits.greedy()

    def log_prob(self, masks: Masks) -> float:
        return self.logits.log_prob(masks)

    def losses(self, windows: Tensor, masks: Masks | None = None) -> Tensor:
        self.live.apply(self.greedy() if masks is None else masks)
        return self.task.shared(windows, self.task.loss)

    def restart(self, masks: Masks, learning_rate: float) -> None:
        self.logits.reset(masks, self.rule.prior)
        self.tracker.restart(learning_rate)

    def to_save(self) -> dict[str, Any]:
        return {**super().to_save(), **self.logits.to_save()}

    def load(self, saved: Mapping[str, Any]) -> None:
        super().load(saved)
        self.logits.load(saved)
