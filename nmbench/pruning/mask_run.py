"""One run of a mask learner by gradients: updates, measurements on selection windows, checkpoints, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from nmbench.comparison import groups_changed
from nmbench.errors import NumericalFailure
from nmbench.evaluation.objective import Objective
from nmbench.pruning.budget import Budget, Budgeted
from nmbench.pruning.learning import LearnTask
from nmbench.pruning.selection import Selection
from nmbench.pruning.training import Training

Masks = Mapping[str, Tensor]
TOLERANCE_NATS = 0.0  # a mask is returned only if it is better than its start


class RunOptions(Budgeted, Protocol):
    """The options of a learner that `MaskRun` reads: those of its budget, and these.

    `kl`: share of the divergence in the objective. `compile`: whether the passes of the model are compiled on a GPU.
    `check_every` and `checkpoint_every`: steps between two measurements, and between two checkpoints.
    """

    @property
    def kl(self) -> float: ...
    @property
    def compile(self) -> bool: ...
    @property
    def check_every(self) -> int: ...
    @property
    def checkpoint_every(self) -> int: ...


class MaskUpdates(Protocol):
    """The updates and the state that a learner brings to a `MaskRun`."""

    def take(self, tokens: Tensor, step: int) -> Tensor:
        """Take update `step`, counted from 0, by a minibatch; return the objective by window, float32 `[n]`."""

    def figures(self, step: int) -> Mapping[str, float]:
        """Return what the curve holds of update `step` besides losses, such as the temperature."""

    def masks(self) -> Masks:
        """Return the strict masks of now, bool `[out, in]`."""

    def state(self) -> Mapping[str, Any]:
        """Return everything that later updates depend on, for a checkpoint."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, which holds other entries too."""


Begin = Callable[[Training, int], MaskUpdates]


class MaskRun:
    """One run of a learner with `options` on `task`, begun or resumed.

    `steps`: updates in the whole run. The curve of the task has the objective of soft and strict masks on the same
    minibatch, the loss on selection windows, the share of changed groups, and the figures of the learner.
    """

    def __init__(self, task: LearnTask, options: RunOptions) -> None:
        self.task, self.options = task, options
        self.budget = Budget.of(task, options)
        self.steps = self.budget.steps
        self.objective = Objective(options.kl)
        self.selection: Selection[Masks] = Selection(task, task.initial, TOLERANCE_NATS)
        self.seed = int(torch.randint(2**62, (), generator=task.generator, device=task.bundle.device))
        self.step = 0

    def result(self, begin: Begin) -> Masks:
        """Return the best masks on held-out windows if others confirm them, else those of the start.

        `begin(live, seed)` returns the updates at the start; `seed` is that of their noise.
        """
        with self.task.gradients() as live, torch.no_grad():
            updates = self._begun(live, begin)
            read = self.budget.minibatch, None, self.budget.windows  # a pass reads every window
            batches = self.task.batches(*read, self.step)
            while self.step < self.steps:
                tokens = next(batches).tokens
                losses = updates.take(tokens, self.step)
                self.step += 1
                if self.step % self.options.check_every == 0 or self.step == self.steps:
                    self._check(live, updates, tokens, losses)
                else:
                    self.task.report(self.step, total=self.steps)
                if self.task.checkpoints.due(self.step, self.options.checkpoint_every) and self.step < self.steps:
                    self.task.checkpoints.save(self._state(updates))
            return self._verdict(live)

    def _begun(self, live: Training, begin: Begin) -> MaskUpdates:
        """Return the updates of the last checkpoint; or measure the start, which is live, and return its updates."""
        if self.options.compile:
            live.compile(self.budget.first, self.objective)
        state = self.task.checkpoints.load()
        if state is None:
            self.selection.start(live.losses(self.selection.looked_at, Objective()))
            return begin(live, self.seed)
        self.selection.restore(state["selection"])
        self.step, self.seed = state["step"], state["seed"]
        updates = begin(live, self.seed)
        updates.restore(state)
        return updates

    def _check(self, live: Training, updates: MaskUpdates, tokens: Tensor, losses: Tensor) -> None:
        """Measure the strict masks: on held-out windows, and on the minibatch, beside the loss of the soft masks."""
        soft = float(losses.mean())
        if not math.isfinite(soft):
            raise NumericalFailure(f"{self.task.who}: the loss of step {self.step} is {soft}; lower the learning_rate.")
        masks = updates.masks()
        held_out = live.losses_under(self.selection.looked_at, masks)
        hard = float(live.losses(tokens, self.objective).mean())
        masks = {name: mask.cpu() for name, mask in masks.items()}
        self.selection.look(self.step, masks, held_out)
        self.task.report(
            self.step,
            total=self.steps,
            masks=masks,
            soft=soft,
            hard=hard,
            held_out=float(held_out.mean()),
            changed=groups_changed(masks, self.task.initial, self.task.pattern),
            **updates.figures(self.step - 1),
        )

    def _verdict(self, live: Training) -> Masks:
        """Confirm the best masks, and write the notes of the record."""
        masks = self.selection.verdict(live.losses_under)
        self.task.notes.update(
            {
                "steps": self.step,
                **self.selection.notes(),
                "best_step": self.selection.best_at,
                "groups_changed": groups_changed(masks, self.task.initial, self.task.pattern),
            }
        )
        return masks

    def _state(self, updates: MaskUpdates) -> dict[str, Any]:
        """Return everything that later steps depend on."""
        plain = {"step": self.step, "seed": self.seed, "selection": self.selection.state()}
        return {**plain, **updates.state()}
