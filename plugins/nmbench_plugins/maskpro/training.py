"""One run of MaskPro, from the initial mask to the returned mask: steps, measurements, checkpoints."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING

from torch import Tensor

import nmbench
from nmbench.evaluation import groups_changed, losses_in_parts
from nmbench_plugins.maskpro.engines import Engine
from nmbench_plugins.maskpro.masks import Packed
from nmbench_plugins.maskpro.tracker import Figures
from nmbench_plugins.maskpro.watch import Watch

if TYPE_CHECKING:
    from nmbench_plugins.maskpro.learner import MaskPro

CHECKPOINT_SECONDS = 180.0  # the longest time between two checkpoints
SHARE_OF_TIME = 10  # but learning gets this many times the seconds that a checkpoint takes


class Training:
    """The state of a run. The engine takes the steps; this class does everything between two steps."""

    def __init__(self, task: nmbench.LearnTask, method: MaskPro, windows: Tensor, engine: Engine) -> None:
        self.task = task
        self.method = method
        self.windows = windows
        self.engine = engine
        self.initial = Packed(task.initial, task.bundle.device)  # an eighth of the bytes to send to the device
        self.watch = Watch(task, self.engine, self.initial, method.tolerance) if method.select else None
        self.log: list[dict[str, float]] = []  # one entry each `check_every` steps
        self.unchecked: list[Tensor] = []  # window numbers of the steps whose figures were not read back
        self.figures: Figures | None = None
        self.step = self.saved_step = 0
        self.saved_at, self.save_seconds = time.perf_counter(), 0.0

    def start(self) -> None:
        """Measure the initial mask, or restore the last checkpoint."""
        saved = self.task.checkpoints.load()
        if saved is None:
            self.references = self.measure()
            if self.watch:
                self.watch.start()
            return
        self.engine.load(saved)
        if self.watch:
            self.watch.load(saved)
        self.step = self.saved_step = saved["step"]
        self.log = list(saved["log"])
        self.references = saved["references"].to(self.task.bundle.device)
        self.task.generator.set_state(saved["generator"])

    def measure(self) -> Tensor:
        """Return f(m_0) of every window: float32 `[windows]`."""
        report = functools.partial(self.task.progress, "measure the initial mask")
        return losses_in_parts(self.engine.references, self.windows, self.method.minibatch, report)

    def run(self) -> None:
        """Take the remaining steps."""
        generator = self.task.generator if self.method.shuffle else None
        batches = self.task.batches(self.method.minibatch, generator, self.windows, self.step)
        while not self.ended:
            chosen, tokens = next(batches)
            self.unchecked.append(chosen)
            self.engine.advance(tokens, self.references[chosen])
            self.step += 1
            due = self.step % self.method.check_every == 0 or self.step == self.method.steps
            if due or self.engine.waits:
                self.read_figures()
            self.report()
            if due:
                self.measure_greedy()
            if self.ended or self.checkpoint_due():
                self.save()

    @property
    def ended(self) -> bool:
        return self.step >= self.method.steps or (self.watch is not None and self.watch.exhausted)

    def report(self) -> None:
        """Report a step to the user, with the figures that were read back last."""
        if self.figures:
            self.task.report(self.step, residual=self.figures.residual, baseline=self.figures.baseline)
        else:
            self.task.report(self.step)

    def read_figures(self) -> None:
        """Read the figures back. Raises `NumericalFailure` if the loss of a step since the last call was not finite."""
        self.figures = self.engine.figures()
        broken = self.figures.broken
        if broken is not None:
            chosen = self.unchecked[broken - self.step - 1].tolist()
            kept = (
                f"the checkpoint of step {self.saved_step} is kept" if self.saved_step else "there is no checkpoint yet"
            )
            raise nmbench.NumericalFailure(
                f"{self.task.who}: the loss of step {broken} is {self.figures.residual} (minibatch: windows "
                f"{', '.join(map(str, chosen))}); {kept}. Check for infinite activations; another --dtype may help."
            )
        self.unchecked.clear()

    def measure_greedy(self) -> None:
        """Add the figures of the greedy mask to the log, with those of the watch on held-out windows."""
        assert self.figures
        masks = Packed(self.engine.greedy(), self.task.bundle.device)  # computed once, read several times
        entry = {
            "step": self.step,
            "groups_changed": groups_changed(masks, self.initial, self.task.pattern),
            "log_prob_initial": self.engine.log_prob(self.initial),  # mean over groups
            "spread": self.figures.spread,
            "learning_rate": self.figures.learning_rate,
        }
        self.log.append({**entry, **(self.watch.measure(self.step, masks) if self.watch else {})})

    def checkpoint_due(self) -> bool:
        """Return whether to save now. The clock may decide, because the time of a checkpoint changes no result.

        Of several ranks the clock of rank 0 decides, at steps that all of them know.
        """
        if self.task.checkpoints.ending:
            return True
        waited = time.perf_counter() - self.saved_at
        if self.task.ranks.size > 1:
            known = self.step % self.method.checkpoint_every == 0
            return known and bool(self.task.ranks.decided(waited >= SHARE_OF_TIME * self.save_seconds))
        if waited < SHARE_OF_TIME * self.save_seconds:
            return False
        return self.step % self.method.checkpoint_every == 0 or waited >= CHECKPOINT_SECONDS

    def save(self) -> None:
        """Store everything that later steps depend on."""
        if self.unchecked:
            self.read_figures()
        began = time.perf_counter()
        plain = {"step": self.step, "log": self.log}
        tensors = {"references": self.references, "generator": self.task.generator.get_state()}
        watch = self.watch.to_save() if self.watch else {}
        self.task.checkpoints.save({**self.engine.to_save(), **watch, **plain, **tensors})
        self.saved_step, self.saved_at = self.step, time.perf_counter()
        self.save_seconds = self.saved_at - began

    def conclude(self) -> dict[str, Tensor]:
        """Return the masks by layer, and write the notes of the record."""
        masks = self.engine.greedy()
        figures = self.engine.figures()
        note = f" ({self.engine.note})" if self.engine.note else ""
        self.task.notes.update({"steps": self.step, "baseline": figures.baseline, "log": self.log})
        self.task.notes["engine"] = self.engine.name + note
        if self.watch:
            masks = self.watch.verdict()
            self.task.notes.update(self.watch.notes)
        self.task.notes["groups_changed"] = groups_changed(masks, self.initial, self.task.pattern)
        return {name: mask.cpu() for name, mask in masks.items()}
