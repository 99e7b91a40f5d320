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


def learnt(method: Soft, task: nmbench.LearnTask) -> Mapping[str, Tensor]:
    """Return the best masks on held-out windows if others confirm them, else those of the start."""
    run = MaskRun(task, method)
    schedule = Schedule(run.steps, method.noise, method.learning_rate, method.fall)

    def begin(live: Training, seed: int) -> Updates:
        start = task.pattern, task.initial, task.bundle.device
        logits = Logits(*start, method.leave, method.noise[0], getattr(torch, method.moments))
        return Updates(Steps(live, logits, run.objective, method.straight, seed), schedule)

    return run.result(begin)


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
