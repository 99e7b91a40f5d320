"""One run of distillation: steps, measurements on selection windows, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import nmbench
from nmbench.evaluation import Objective
from nmbench.pruning import Budget, rise_and_fall
from nmbench_plugins.distil.masters import Masters
from nmbench_plugins.distil.steps import Steps

if TYPE_CHECKING:
    from nmbench.pruning import Training
    from nmbench_plugins.distil.learner import Distil


class Run:
    """One run of `method` on `task`, begun or resumed."""

    def __init__(self, method: Distil, task: nmbench.WeightTask) -> None:
        self.method, self.task = method, task
        self.budget = Budget.of(task, method)
        self.count = self.budget.steps
        self.masters = Masters(task, method.chooses)
        self.held_out = task.selection[: max(1, len(task.selection) // 2)]
        self.step = 0

    def result(self) -> Mapping[str, nmbench.Pruned]:
        """Return masks and trained weights."""
        with self.task.training() as live, torch.no_grad():
            batches = self.task.batches(self.budget.minibatch, self.task.generator, self.budget.windows)
            objective = Objective(self.method.kl)
            if self.method.compile:
                live.compile(self.budget.first, objective)
            steps = Steps(live, self.masters, objective, self.method.decay)
            self._resume(steps)
            while self.step < self.count:
                rate = self.method.learning_rate * rise_and_fall(self.step, self.count, self.method.warmup)
                losses = steps.take(next(batches).tokens, rate)
                self.step += 1
                if self.method.chooses and self.step % self.method.refresh_every == 0:
                    self.task.notes["flipped last"] = self.masters.refresh()
                    steps.write()
                self._report(live, losses, steps)
        return self.masters.pruned()

    def _report(self, live: Training, losses: Tensor, steps: Steps) -> None:
        last = self.step == self.count
        if self.step % self.method.check_every == 0 or last:
            loss = float(losses.mean())
            if not math.isfinite(loss):
                raise nmbench.NumericalFailure(f"the loss of step {self.step} is {loss}; lower the learning_rate.")
            self.task.check_same(self.masters.masks)
            held_out = float(live.losses(self.held_out, Objective()).mean())
            self.task.report(self.step, total=self.count, objective=loss, held_out=held_out)
        else:
            self.task.report(self.step, total=self.count)
        if self.task.checkpoints.due(self.step, self.method.checkpoint_every) and not last:
            self.task.checkpoints.save(self._state(steps))

    def _state(self, steps: Steps) -> dict[str, Any]:
        random = self.task.generator.get_state()
        return {"step": self.step, "random": random, "moments": steps.moments(), **self.masters.state()}

    def _resume(self, steps: Steps) -> None:
        """Go on from the last checkpoint, if there is one."""
        state = self.task.checkpoints.load()
        if state is None:
            return
        self.masters.restore(state)
        steps.restore(state["moments"])
        self.task.generator.set_state(state["random"])
        self.step = state["step"]
