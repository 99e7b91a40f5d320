"""One run of the learner: the settings of its steps and its state, for the run that the host conducts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import nmbench
from nmbench.pruning import MaskRun
from nmbench_plugins.soft.logits import Logits
from nmbench_plugins.soft.schedule import Schedule
from nmbench_plugins.soft.steps import Steps

if TYPE_CHECKING:
    from nmbench.pruning import Training
    from nmbench_plugins.soft.learner import Soft


class Run:
    """One run of `method` on `task`, begun or resumed."""

    def __init__(self, method: Soft, task: nmbench.LearnTask) -> None:
        self.method, self.task = method, task
        self.run = MaskRun(task, method)

    def result(self) -> Mapping[str, Tensor]:
        """Return the best masks on held-out windows if others confirm them, else those of the start."""
        return self.run.result(self._begin)

    def _begin(self, live: Training, seed: int) -> Updates:
        start = self.task.pattern, self.task.initial, self.task.bundle.device
        moments = getattr(torch, self.method.moments)
        logits = Logits(*start, self.method.leave, self.method.noise[0], moments)
        steps = Steps(live, logits, self.run.objective, self.method.straight, seed)
        return Updates(steps, Schedule(self.run.steps, self.method.noise, self.method.learning_rate, self.method.fall))


class Updates:
    """The updates of a run, with the settings of a schedule."""

    def __init__(self, steps: Steps, schedule: Schedule) -> None:
        self.steps, self.schedule = steps, schedule
        self.masks, self.state, self.restore = steps.masks, steps.logits.state, steps.logits.restore

    def take(self, tokens: Tensor, step: int) -> Tensor:
        """Take update `step`; return the objective by window."""
        return self.steps.take(tokens, self.schedule.at(step))

    def figures(self, step: int) -> Mapping[str, float]:
        """Return the temperature of update `step`."""
        return {"temperature": self.schedule.at(step).temperature}
