"""How a step of MaskPro is computed, apart from what MaskPro is: the interface, and plain torch behind it.

An engine holds the logits and the scalars. `advance` draws a mask, sends a minibatch through the masked model and
updates the logits; it may leave work for later, as long as everything else here shows the state after the last step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

import nmbench
from nmbench.pruning import LiveWeights
from nmbench_plugins.maskpro.logits import Logits
from nmbench_plugins.maskpro.packed import Masks
from nmbench_plugins.maskpro.tracker import Figures, Rule, Tracker


class Engine:
    """The base of both engines; the live weights belong to it until the task's context closes."""

    name: ClassVar[str]
    waits: ClassVar[bool]  # whether `advance` waits for the device, so that looking at figures costs nothing

    def __init__(self, task: nmbench.LearnTask, live: LiveWeights, rule: Rule, note: str = "") -> None:
        self.task = task
        self.live = live
        self.rule = rule
        self.note = note  # why this engine and how it runs, for the record
        self.tracker = Tracker(rule, task.bundle.device)

    def advance(self, tokens: Tensor, references: Tensor) -> None:
        """One step on windows int64 `[n, window]`, whose losses under the initial mask are `references` `[n]`."""
        raise NotImplementedError

    def figures(self) -> Figures:
        """The scalars after the last step; waits for the device."""
        return self.tracker.figures()

    def greedy(self) -> Masks:
        """The most likely mask of every layer, made as it is asked for."""
        raise NotImplementedError

    def log_prob(self, masks: Masks) -> float:
        """Mean over all groups of log P(masks)."""
        raise NotImplementedError

    def losses(self, windows: Tensor, masks: Masks | None = None) -> Tensor:
        """Mean cross-entropy of each window, float32 `[n]`, under `masks` or else the greedy mask."""
        raise NotImplementedError

    def references(self, tokens: Tensor) -> Tensor:
        """Losses of one minibatch under the greedy mask, computed the way `advance` does it."""
        return self.losses(tokens)

    def restart(self, masks: Masks, learning_rate: float) -> None:
        """Go back to logits `prior * masks`, with another step size and no memory of residuals."""
        raise NotImplementedError

    def slow_down(self, learning_rate: float) -> None:
        """Go on with another step size; the next loss is the first that it counts for."""
        self.tracker.learning_rate.fill_(learning_rate)

    def to_save(self) -> dict[str, Any]:
        """Everything that later steps depend on besides the task's generator."""
        return {"engine": self.name, **self.tracker.to_save()}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `to_save` gave. Raises `NMBenchError` if another engine did, whose draws are others."""
        if saved["engine"] != self.name:
            raise nmbench.NMBenchError(
                f"{self.task.who} has a checkpoint of engine {saved['engine']}, and this is {self.name} ({self.note}); "
                "start anew with another --out."
            )
        self.tracker.load(saved)


class TorchEngine(Engine):
    """Vectorised torch on any device and for every pattern: masks are written into the live weights."""

    name = "torch"
    waits = True

    def __init__(self, task: nmbench.LearnTask, live: LiveWeights, rule: Rule, note: str = "") -> None:
        super().__init__(task, live, rule, note)
        self.logits = Logits.prior(task, rule.prior)

    def advance(self, tokens: Tensor, references: Tensor) -> None:
        masks = self.logits.draw(self.task.generator)
        self.live.apply(masks.by_layer)
        self.tracker.take(self.task.loss(tokens), references)
        self.logits.step(masks, float(self.tracker.scale))

    def greedy(self) -> Masks:
        return self.logits.greedy()

    def log_prob(self, masks: Masks) -> float:
        return self.logits.log_prob(masks)

    def losses(self, windows: Tensor, masks: Masks | None = None) -> Tensor:
        self.live.apply(self.greedy() if masks is None else masks)
        return self.task.loss(windows)

    def restart(self, masks: Masks, learning_rate: float) -> None:
        self.logits.reset(masks, self.rule.prior)
        self.tracker.restart(learning_rate)

    def to_save(self) -> dict[str, Any]:
        return {**super().to_save(), **self.logits.to_save()}

    def load(self, saved: Mapping[str, Any]) -> None:
        super().load(saved)
        self.logits.load(saved)
