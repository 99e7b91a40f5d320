"""One run of the learner: the settings of its steps and its state, for the run that the host conducts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import nmbench
from nmbench.pruning import MaskRun
from nmbench_plugins.maskllm.gates import Gates
from nmbench_plugins.maskllm.schedule import Schedule
from nmbench_plugins.maskllm.steps import Steps

if TYPE_CHECKING:
    from nmbench.pruning import Training
    from nmbench_plugins.maskllm.learner import MaskLLM


def learnt(method: MaskLLM, task: nmbench.LearnTask) -> Mapping[str, Tensor]:
    """Return the best masks on held-out windows if others confirm them, else those of the start."""
    run = MaskRun(task, method)

    def begin(live: Training, seed: int) -> Updates:
        gates = Gates(task, method.leave, method.first_scale, getattr(torch, method.moments))
        return Updates(Steps(live, gates, run.objective, seed), schedule_of(method, run.steps))

    return run.result(begin)


def schedule_of(method: MaskLLM, steps: int) -> Schedule:
    """Return the schedule of a run of `steps` updates."""
    return Schedule(
        steps,
        method.annealing,
        method.annealed,
        (method.first_temperature, method.last_temperature),
        (method.first_scale, method.last_scale),
        method.reward,
        method.learning_rate,
        method.fall,
    )


class Updates:
    """The updates of a run, with the settings of a schedule."""

    def __init__(self, steps: Steps, schedule: Schedule) -> None:
        self.steps, self.schedule = steps, schedule
        self.masks, self.state, self.restore = steps.masks, steps.gates.state, steps.gates.restore

    def take(self, tokens: Tensor, step: int) -> Tensor:
        """Take update `step`; return the objective by window."""
        return self.steps.take(tokens, self.schedule.at(step))

    def figures(self, step: int) -> Mapping[str, float]:
        """Return temperature and scale of update `step`."""
        setting = self.schedule.at(step)
        return {"temperature": setting.temperature, "scale": setting.scale}
