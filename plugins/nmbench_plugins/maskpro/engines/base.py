"""The interface of an engine: the computation of a step of MaskPro, apart from the algorithm around the steps.

An engine holds the logits and the scalars of a run. `advance` draws a mask, computes the loss of a minibatch under that
mask and updates the logits. `advance` may postpone its update, as long as every other method shows the state after the
last step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

import nmbench
from nmbench.pruning import LiveWeights
from nmbench_plugins.maskpro.masks import Masks
from nmbench_plugins.maskpro.tracker import Figures, Rule, Tracker


class Engine:
    """The base of all engines; the live weights belong to the engine until the task's context closes."""

    name: ClassVar[str]
    waits: ClassVar[bool]  # whether `advance` waits for the device, so that reading the figures back costs nothing

    def __init__(self, task: nmbench.LearnTask, live: LiveWeights, rule: Rule, note: str = "") -> None:
        self.task = task
        self.live = live
        self.rule = rule
        self.note = note  # the reason for this engine and its mode of running, for the record
        self.tracker = Tracker(rule, task.bundle.device)

    def advance(self, tokens: Tensor, references: Tensor) -> None:
        """Take one step on windows `tokens`, int64 `[n, window]`.

        `references` `[n]` are the losses of these windows under the initial mask.
        """
        raise NotImplementedError

    def figures(self) -> Figures:
        """Return the scalars after the last step; the host waits for the device."""
        return self.tracker.figures()

    def greedy(self) -> Masks:
        """Return the most likely mask; the mask of a layer is computed when the caller reads that layer."""
        raise NotImplementedError

    def log_prob(self, masks: Masks) -> float:
        """Return the mean of log P(masks) over all groups."""
        raise NotImplementedError

    def losses(self, windows: Tensor, masks: Masks | None = None) -> Tensor:
        """Return the mean cross-entropy of each window, float32 `[n]`, under `masks` or else the greedy mask."""
        raise NotImplementedError

    def references(self, tokens: Tensor) -> Tensor:
        """Return the losses of one minibatch under the greedy mask, by the same arithmetic as in `advance`."""
        return self.losses(tokens)

    def restart(self, masks: Masks, learning_rate: float) -> None:
        """Set the logits to `prior * masks`, set the step size, and forget the residuals."""
        raise NotImplementedError

    def slow_down(self, learning_rate: float) -> None:
        """Set the step size; the next loss is the first loss that this step size applies to."""
        self.tracker.learning_rate.fill_(learning_rate)

    def to_save(self) -> dict[str, Any]:
        """Return everything that later steps depend on, except the task's generator."""
        return {"engine": self.name, **self.tracker.to_save()}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restore a state from `to_save`. Raises `NMBenchError` for the state of another engine: draws differ."""
        if saved["engine"] != self.name:
            raise nmbench.NMBenchError(
                f"{self.task.who} has a checkpoint of engine {saved['engine']}, and this is {self.name} ({self.note}); "
                "start anew with another --out."
            )
        self.tracker.load(saved)
