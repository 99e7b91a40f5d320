"""The guard of a learner: held-out windows choose the mask and detect drift, and other held-out windows confirm.

At regular steps the guard measures the greedy mask on held-out windows. The greedy mask with the lowest loss is kept,
and confirmed at the end, by the rules of `nmbench.Selection`. A learner has drifted when several measurements in a row
find the greedy mask clearly worse than the best mask. Then the step size is halved. If more than a small part of the
gain is lost, or the policy hardly draws the best mask any more, the learner also goes back to the best mask. Otherwise
the learner goes on from the present logits, because these logits hold what was learnt about many weights that are about
to flip. On SmolLM2-135M nine runs like preset `long` lost up to 19 % of their gain, went back, and gained nothing more
in up to 13,000 steps; going on, two of the same runs gained 17 and 9 % more, and no other run lost anything
(benchmarks/README.md). Runs with larger steps lost 25 % and more, went back, and gained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

import nmbench
from nmbench.evaluation import ONE_SIDED_95, standard_error
from nmbench_plugins.maskpro.engines import Engine
from nmbench_plugins.maskpro.masks import Masks, Packed

PATIENCE = 3  # measurements in a row that find the mask clearly worse
AT_ONCE_NATS = 0.5  # a rise that needs no second measurement
FORGOTTEN_NATS = 1.0  # fall of the mean log P of the best mask
SLIGHT = 0.2  # of the gain: the most that may be lost without going back
HALVINGS = 6  # of the step size; the next drift ends learning


class Watch:
    """The best greedy mask of a learner so far, and the drifts; `verdict` sets `notes` for the record.

    An entry of `drifts` has the step, the reason, the step that the learner went back to (None: the learner went on)
    and the step size from then on.
    """

    def __init__(self, task: nmbench.LearnTask, engine: Engine, initial: Packed, tolerance_nats: float) -> None:
        self.task = task
        self.engine = engine
        self.tolerance_nats = tolerance_nats
        self.selection = nmbench.Selection(task, initial, tolerance_nats)
        self.initial_log_prob = 0.0  # mean over groups, of the initial policy
        self.initial_loss = 0.0
        self.worse = 0  # measurements in a row
        self.drifts: list[dict[str, Any]] = []
        self.notes: dict[str, Any] = {}

    def start(self) -> None:
        """Measure the initial mask, which is the greedy mask of the engine at the start."""
        losses = self.losses(self.selection.looked_at)
        self.selection.start(losses)
        self.initial_loss = float(losses.mean())
        self.initial_log_prob = self.engine.log_prob(self.best)

    @property
    def best(self) -> Packed:
        return self.selection.best

    @property
    def best_step(self) -> int:
        return self.selection.best_at

    def measure(self, step: int, masks: Packed) -> dict[str, float]:
        """Measure the greedy mask `masks`, keep the best mask so far, and slow learning down after a drift.

        Returns the held-out loss in nats and the mean log P of the best mask, for the log.
        """
        losses = self.losses(self.selection.looked_at)
        loss = float(losses.mean())
        self.selection.look(step, masks, losses)
        log_prob = self.engine.log_prob(self.best)
        best_losses = self.selection.best_losses
        gained = self.initial_loss - float(best_losses.mean())
        self.task.report(step, masks=masks, held_out=loss, gained=gained)
        rise = losses - best_losses
        least = float(rise.mean()) - ONE_SIDED_95 * standard_error(rise)
        self.worse = 0 if least <= self.tolerance_nats else self.worse + 1  # NaN is worse
        above = f"held-out loss {float(rise.mean()):.4f} nats above the best"
        if not least <= AT_ONCE_NATS:
            self.slow_down(step, loss, above, back=True)
        elif log_prob < self.initial_log_prob - FORGOTTEN_NATS:
            fell = f"mean log P of the best mask fell from {self.initial_log_prob:.3f} to {log_prob:.3f}"
            self.slow_down(step, loss, fell, back=True)
        elif self.worse >= PATIENCE:
            self.slow_down(step, loss, above, back=float(rise.mean()) > SLIGHT * gained)
        return {"held_out": loss, "log_prob_best": log_prob}

    def slow_down(self, step: int, loss: float, reason: str, back: bool) -> None:
        """Halve the step size, and go `back` to the best mask or on from the present logits."""
        learning_rate = self.engine.figures().learning_rate / 2
        if back:
            self.engine.restart(self.best, learning_rate)
        else:
            self.engine.slow_down(learning_rate)
        self.worse = 0
        back_to = self.best_step if back else None
        self.drifts.append({"step": step, "why": reason, "back_to": back_to, "learning_rate": learning_rate})
        self.task.report(step, held_out=loss, back_to=self.best_step if back else step, learning_rate=learning_rate)

    @property
    def exhausted(self) -> bool:
        """True after more than `HALVINGS` halvings of the step size, which ends learning."""
        return len(self.drifts) > HALVINGS

    def verdict(self) -> Masks:
        """Return the best mask if the unseen half of the windows confirms that mask, else the initial mask."""
        masks = self.selection.verdict(self.losses)
        self.notes = {**self.selection.notes(), "best_step": self.best_step, "drifts": self.drifts}
        return masks

    def losses(self, windows: Tensor, masks: Masks | None = None) -> Tensor:
        """Return the losses of all windows under `masks` or the greedy mask, float64 `[windows]` on the CPU."""
        return self.engine.losses(windows, masks).double().cpu()

    def to_save(self) -> dict[str, Any]:
        figures = {name: getattr(self, name) for name in SAVED}
        figures |= {"best_step": self.best_step, "best_losses": self.selection.best_losses}
        return {**self.best.to_save("best"), **{f"watch {name}": value for name, value in figures.items()}}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restore a state from a checkpoint."""
        self.selection.best = self.selection.initial.with_bits("best", saved)
        self.selection.best_at, self.selection.best_losses = saved["watch best_step"], saved["watch best_losses"]
        for name in SAVED:
            setattr(self, name, saved[f"watch {name}"])


SAVED = ("initial_log_prob", "initial_loss", "worse", "drifts")
