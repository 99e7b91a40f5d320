"""One run of distillation: steps, measurements on selection windows, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

import nmbench
from nmbench.evaluation import Objective
from nmbench_plugins.distil.masters import Masters

if TYPE_CHECKING:
    from nmbench.pruning import Training
    from nmbench_plugins.distil.learner import Distil

BETAS = (0.9, 0.95)


class Run:
    """One run of `method` on `task`, begun or resumed."""

    def __init__(self, method: Distil, task: nmbench.WeightTask) -> None:
        self.method, self.task = method, task
        self.objective = Objective(method.kl)
        self.windows = task.windows(method.window_tokens)
        self.minibatch = min(method.minibatch, len(self.windows))
        self.steps = steps_of(method, self.windows.numel(), self.minibatch * self.windows.shape[1])
        self.masters = Masters(task, method.chooses)
        parameters = [tensor.requires_grad_() for tensor in self.masters.tensors.values()]
        self.optimiser = torch.optim.Adam(parameters, betas=BETAS, fused=task.bundle.device.type == "cuda")
        self.held_out = task.selection[: max(1, len(task.selection) // 2)]
        self.step = 0

    def result(self) -> Mapping[str, nmbench.Pruned]:
        """Return masks and trained weights."""
        self._resume()
        with self.task.training() as live, torch.no_grad():
            self._write(live)
            batches = self.task.batches(self.minibatch, self.task.generator, self.windows)
            while self.step < self.steps:
                loss = self._update(live, next(batches).tokens)
                self.step += 1
                self._report(live, loss)
        return self.masters.pruned()

    def _update(self, live: Training, tokens: torch.Tensor) -> float:
        """Do one step; return the objective on its minibatch."""
        self.optimiser.param_groups[0]["lr"] = self._rate()
        live.clear()
        losses = live.backward(tokens, self.objective)
        for name, master in self.masters.tensors.items():
            master.grad = self.masters.gradient(name, live.gradient(name), self.method.decay)
        self.optimiser.step()
        if self.method.chooses and (self.step + 1) % self.method.refresh_every == 0:
            self.task.notes["flipped last"] = self.masters.refresh()
        self._write(live)
        return float(losses.mean())

    def _rate(self) -> float:
        """Return the step size: a linear rise, then a linear fall to 0."""
        rising = max(1, round(self.method.warmup * self.steps))
        falling = (self.steps - self.step) / max(1, self.steps - rising)
        return self.method.learning_rate * min((self.step + 1) / rising, falling)

    def _write(self, live: Training) -> None:
        for name in self.masters.tensors:
            live.write(name, self.masters.masked(name))

    def _report(self, live: Training, loss: float) -> None:
        if not math.isfinite(loss):
            raise nmbench.NumericalFailure(f"the loss of step {self.step} is {loss}; lower the learning_rate.")
        values: dict[str, Any] = {"objective": loss}
        if self.step % self.method.check_every == 0 or self.step == self.steps:
            values["held-out nats"] = float(live.losses(self.held_out, Objective()).mean())
        self.task.report(self.step, total=self.steps, **values)
        if self.step % self.method.checkpoint_every == 0 and self.step < self.steps:
            self.task.checkpoints.save(self._state())

    def _state(self) -> dict[str, Any]:
        random = self.task.generator.get_state()
        return {"step": self.step, "random": random, "optimiser": self.optimiser.state_dict(), **self.masters.state()}

    def _resume(self) -> None:
        """Go on from the last checkpoint, if there is one."""
        state = self.task.checkpoints.load()
        if state is None:
            return
        with torch.no_grad():
            self.masters.restore(state)
        self.optimiser.load_state_dict(state["optimiser"])
        self.task.generator.set_state(state["random"])
        self.step = state["step"]


def steps_of(method: Distil, pool_tokens: int, step_tokens: int) -> int:
    """Return the number of steps that the budget allows."""
    tokens = method.tokens if method.tokens is not None else round(method.passes * pool_tokens)
    return tokens // step_tokens
