"""One run of the learner: steps, measurements on selection windows, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import nmbench
from nmbench.evaluation import Objective, groups_changed
from nmbench.pruning import steps_within
from nmbench_plugins.soft.logits import Logits
from nmbench_plugins.soft.schedule import Schedule
from nmbench_plugins.soft.steps import Steps

if TYPE_CHECKING:
    from nmbench.pruning import Training
    from nmbench_plugins.soft.learner import Soft

Masks = Mapping[str, Tensor]
TOLERANCE_NATS = 0.0  # a mask is returned only if it is better than its start


class Run:
    """One run of `method` on `task`, begun or resumed."""

    def __init__(self, method: Soft, task: nmbench.LearnTask) -> None:
        self.method, self.task = method, task
        self.windows = task.windows(method.window_tokens)
        self.minibatch = min(method.minibatch, len(self.windows))
        step_tokens = self.minibatch * self.windows.shape[1]
        self.count = steps_within(method.tokens, method.passes, self.windows.numel(), step_tokens)
        self.schedule = Schedule(self.count, method.noise, method.learning_rate, method.fall)
        logits = (task.pattern, task.initial, task.bundle.device, method.leave, method.noise[0])
        self.logits = Logits(*logits, getattr(torch, method.moments))
        self.objective = Objective(method.kl)
        self.selection: nmbench.Selection[Masks] = nmbench.Selection(task, task.initial, TOLERANCE_NATS)
        self.seed = int(torch.randint(2**62, (), generator=task.generator, device=task.bundle.device))
        self.step = 0

    def result(self) -> Masks:
        """Return the best masks on held-out windows if others confirm them, else those of the start."""
        with self.task.gradients() as live, torch.no_grad():
            self._begin(live)
            if self.method.compile:
                live.compile(self.windows[: self.minibatch], self.objective)
            steps = Steps(live, self.logits, self.objective, self.method.straight, self.seed)
            batches = self.task.batches(self.minibatch, None, self.windows, self.step)  # a pass reads every window
            while self.step < self.count:
                tokens, setting = next(batches).tokens, self.schedule.at(self.step)
                losses = steps.take(tokens, setting)
                self.step += 1
                if self.step % self.method.check_every == 0 or self.step == self.count:
                    self._check(live, steps, tokens, losses, setting.temperature)
                else:
                    self.task.report(self.step, total=self.count)
                if self.step % self.method.checkpoint_every == 0 and self.step < self.count:
                    self.task.checkpoints.save(self._state())
            return self._verdict(live)

    def _begin(self, live: Training) -> None:
        """Go on from the last checkpoint, or measure the start, whose masked weights are live."""
        state = self.task.checkpoints.load()
        if state is None:
            self.selection.start(live.losses(self.selection.looked_at, Objective()))
            return
        self.logits.restore(state)
        self.selection.restore(state["selection"])
        self.step, self.seed = state["step"], state["seed"]

    def _check(self, live: Training, steps: Steps, tokens: Tensor, losses: Tensor, temperature: float) -> None:
        """Measure the greedy masks: on the minibatch, beside the loss of the soft masks, and on held-out windows."""
        soft = float(losses.mean())
        if not math.isfinite(soft):
            raise nmbench.NumericalFailure(
                f"{self.task.who}: the loss of step {self.step} is {soft}; lower the learning_rate."
            )
        steps.show_greedy()
        hard = float(live.losses(tokens, self.objective).mean())
        held_out = live.losses(self.selection.looked_at, Objective())
        masks = self.logits.masks()
        self.selection.look(self.step, masks, held_out)
        self.task.report(
            self.step,
            total=self.count,
            masks=masks,
            soft=soft,
            hard=hard,
            held_out=float(held_out.mean()),
            changed=groups_changed(masks, self.task.initial, self.task.pattern),
            temperature=temperature,
        )

    def _verdict(self, live: Training) -> Masks:
        """Confirm the best masks, and write the notes of the record."""

        def measure(windows: Tensor, masks: Masks) -> Tensor:
            live.apply(masks)
            return live.losses(windows, Objective())

        masks = self.selection.verdict(measure)
        confirmation = self.selection.confirmation
        self.task.notes.update(
            {
                "steps": self.step,
                "returned": "learnt" if self.selection.confirmed else "initial",
                "best_step": self.selection.best_at,
                "confirmation": asdict(confirmation) if confirmation else None,
                "groups_changed": groups_changed(masks, self.task.initial, self.task.pattern),
            }
        )
        return masks

    def _state(self) -> dict[str, Any]:
        """Return everything that later steps depend on."""
        plain = {"step": self.step, "seed": self.seed, "selection": self.selection.state()}
        return {**plain, **self.logits.state()}
