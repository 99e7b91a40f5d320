"""One run of the learner: trials at several lam, the training, measurements on selection windows, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import nmbench
from nmbench.evaluation import Objective, groups_changed
from nmbench.pruning import Budget, rise_and_fall
from nmbench_plugins.proxsparse.masters import Masters
from nmbench_plugins.proxsparse.search import RATIO, Trial, best_power, lams, next_power
from nmbench_plugins.proxsparse.steps import Steps

if TYPE_CHECKING:
    from nmbench.pruning import Training
    from nmbench_plugins.proxsparse.learner import ProxSparse

Masks = Mapping[str, Tensor]
TOLERANCE_NATS = 0.0  # a mask is returned only if it is better than its start
Lam = Mapping[nmbench.Pattern, float]


class Run:
    """One run of `method` on `task`, begun or resumed.

    `trials`: those that are over. `done`: updates of these trials; `step`: those of the present training.
    """

    def __init__(self, method: ProxSparse, task: nmbench.LearnTask) -> None:
        self.method, self.task = method, task
        self.budget = Budget.of(task, method)
        self.count = self.budget.steps
        searched = method.search if method.lam is None else 0.0
        self.trial_steps = int(searched * self.count) // method.trials
        self.masters = Masters(task, method.shrink)
        self.selection: nmbench.Selection[Masks] = nmbench.Selection(task, task.initial, TOLERANCE_NATS)
        self.trials: list[Trial] = []
        self.done = self.step = 0
        self.seconds = 0.0  # of the search

    def result(self) -> Masks:
        """Return the best masks on held-out windows if others confirm them, else those of the start."""
        with self.task.gradients() as live, torch.no_grad():
            self._begin(live)
            steps = Steps(live, self.masters, Objective(self.method.kl))
            self._search(live, steps)
            self._train(live, steps, best_power(self.trials), self.count - self.done)
            return self._verdict(live)

    def _search(self, live: Training, steps: Steps) -> None:
        """Go through the trials that are left."""
        while self.trial_steps and (power := next_power(self.trials, self.method.trials)) is not None:
            start = time.monotonic()
            held_out = self._train(live, steps, power, self.trial_steps)
            self.trials.append(Trial(power, held_out))
            self.seconds += time.monotonic() - start
            self.done, self.step = self.done + self.trial_steps, 0
            self.masters.begin(self.task, self.method.shrink)

    def _train(self, live: Training, steps: Steps, power: int, count: int) -> float:
        """Go on with a training of `count` steps at `power`; return the held-out loss of its last masks."""
        lam, held_out = self._lam(power, count), math.nan
        read = self.budget.minibatch, None, self.budget.windows  # a pass reads every window
        batches = self.task.batches(*read, self.step)
        while self.step < count:
            rate = self.method.learning_rate * rise_and_fall(self.step, count, self.method.warmup)
            losses = steps.take(next(batches).tokens, self.step, rate, lam)
            self.step += 1
            at = self.done + self.step
            if at % self.method.check_every == 0 or self.step == count:
                held_out = self._check(live, losses, at, lam)
            else:
                self.task.report(at, total=self.count)
            if at % self.method.checkpoint_every == 0 and self.step < count:
                self.task.checkpoints.save(self._state())
        return held_out

    def _lam(self, power: int, count: int) -> Lam:
        """Return lam of every pattern: the one given, or that of a training of `count` steps at `power`."""
        if self.method.lam is not None:
            return dict.fromkeys(self.task.pattern.values(), self.method.lam)
        return lams(RATIO**power, count, self.task.dense, self.task.pattern)

    def _begin(self, live: Training) -> None:
        """Go on from the last checkpoint, or measure the start, whose masked weights are live."""
        state = self.task.checkpoints.load()
        if state is None:
            self.selection.start(live.losses(self.selection.looked_at, Objective()))
            return
        self.masters.restore(state)
        self.selection.restore(state["selection"])
        self.trials = [Trial(**trial) for trial in state["trials"]]
        self.done, self.step, self.seconds = state["done"], state["step"], state["seconds"]

    def _check(self, live: Training, losses: Tensor, at: int, lam: Lam) -> float:
        """Measure the masks of the largest masters on held-out windows; return their loss."""
        loss = float(losses.mean())
        if not math.isfinite(loss):
            raise nmbench.NumericalFailure(
                f"{self.task.who}: the loss of step {at} is {loss}; lower the learning_rate."
            )
        masks = self.masters.masks()
        held_out = live.losses_under(self.selection.looked_at, masks)
        self.selection.look(at, masks, held_out)
        self.task.report(
            at,
            total=self.count,
            masks=masks,
            loss=loss,
            held_out=float(held_out.mean()),
            sparse=self.masters.sparse(),
            changed=groups_changed(masks, self.task.initial, self.task.pattern),
            lam=next(iter(lam.values())),
        )
        return float(held_out.mean())

    def _verdict(self, live: Training) -> Masks:
        """Confirm the best masks, and write the notes of the record."""
        masks = self.selection.verdict(live.losses_under)
        self.task.notes.update(
            {
                "steps": self.done + self.step,
                "lam": named(self._lam(best_power(self.trials), self.step or self.trial_steps)),
                "search": self._search_note(),
                "sparse": self.masters.sparse(),
                **self.selection.notes(),
                "best_step": self.selection.best_at,
                "groups_changed": groups_changed(masks, self.task.initial, self.task.pattern),
            }
        )
        return masks

    def _search_note(self) -> dict[str, Any] | None:
        """Return the trials and what they cost, None without a search."""
        if not self.trials:
            return None
        trials = [
            {"lam": named(self._lam(t.power, self.trial_steps)), "strength": RATIO**t.power, "held_out": t.held_out}
            for t in self.trials
        ]
        tokens = len(trials) * self.trial_steps * self.budget.step_tokens
        return {"trials": trials, "steps": self.trial_steps, "tokens": tokens, "seconds": self.seconds}

    def _state(self) -> dict[str, Any]:
        """Return everything that later steps depend on."""
        plain = {"done": self.done, "step": self.step, "seconds": self.seconds, "selection": self.selection.state()}
        return {**plain, "trials": [asdict(trial) for trial in self.trials], **self.masters.state()}


def named(lam: Lam) -> dict[str, float]:
    """Return lam by the name of the pattern, as JSON holds it."""
    return {str(pattern): value for pattern, value in lam.items()}
