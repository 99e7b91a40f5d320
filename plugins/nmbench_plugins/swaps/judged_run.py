"""One run of judged swaps: rounds over the blocks, checkpoints, and the choice by held-out windows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import nmbench
from nmbench.calibration import FewTokens, Step, full_float32, walk
from nmbench.evaluation import groups_changed
from nmbench.pruning import LiveWeights
from nmbench.results import pack, unpack
from nmbench_plugins.swaps.aim import Aim
from nmbench_plugins.swaps.descent import descend
from nmbench_plugins.swaps.judge import Judge
from nmbench_plugins.swaps.problem import Problem

if TYPE_CHECKING:
    from nmbench_plugins.swaps.learner import SwapsJudged

CHECKPOINT_SECONDS = 60.0  # between two checkpoints inside a round; the time of a checkpoint changes no result
SAVED = ("round", "block", "log")
AT_ONCE = 2**28  # weights of proposals that are computed together

Masks = Mapping[str, Tensor]


class Trial(NamedTuple):
    """Masks proposed for layers with the same inputs, and the losses float64 `[windows]` of the model with them."""

    aim: Aim
    masks: Masks
    losses: Tensor


class JudgedRun:
    """The state of a run: the present masks, the best masks, and the current round and block.

    A checkpoint inside a round is stored after `checkpoint_seconds`; `judge` makes the judge of a block.
    """

    def __init__(
        self,
        task: nmbench.LearnTask,
        method: SwapsJudged,
        live: LiveWeights,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        judge: Callable[[nmbench.LearnTask, int, Tensor, int], Judge] = Judge,
    ) -> None:
        self.task, self.method, self.live = task, method, live
        self.checkpoint_seconds, self.judge = checkpoint_seconds, judge
        self.aims = Aim.parsed(method.aims)
        self.needs = nmbench.Stat.NONE
        for aim in self.aims:
            self.needs |= aim.needs
        self.masks = {name: mask.to(task.bundle.device) for name, mask in task.initial.items()}
        self.selection: nmbench.Selection[Masks] = nmbench.Selection(task, dict(self.masks), method.tolerance)
        self.round = self.block = 0
        self.statistics = torch.zeros(0, dtype=torch.int64)  # numbers of this round's windows
        self.few = FewTokens()
        self.log: list[dict[str, Any]] = []  # one entry for the start, and one each round
        self.saved_at = time.perf_counter()

    def learnt(self) -> dict[str, Tensor]:
        """Do the whole run, or the rest of a run from its last checkpoint; return the masks by layer."""
        self.start()
        self.run()
        return self.conclude()

    def start(self) -> None:
        """Measure the initial mask, or restore the last checkpoint."""
        saved = self.task.checkpoints.load()
        if saved is None:
            losses = self.losses(self.selection.looked_at, self.masks)
            self.selection.start(losses)
            held_out = float(losses.mean())
            self.log.append({"round": 0, "held_out": held_out, "forward_tokens": self.task.cost.forward_tokens})
            return
        for name in SAVED:
            setattr(self, name, saved[name])
        self.selection.best_at, self.selection.best_losses = saved["best_round"], saved["best_losses"]
        self.masks, self.selection.best = self.unpacked("masks", saved), self.unpacked("best", saved)
        self.statistics = saved["statistics"]
        self.few.never_reached, self.few.under_calibrated = saved["never_reached"], saved["under_calibrated"]
        self.task.generator.set_state(saved["generator"].cpu())
        self.live.apply(self.masks)

    def run(self) -> None:
        """Do the remaining rounds."""
        while self.round < self.method.rounds:
            if self.block == 0:
                self.begin_round()
            self.visit_blocks()
            self.end_round()
            self.save()

    def begin_round(self) -> None:
        """Draw the windows for the statistics of this round."""
        self.statistics = self.draw(self.method.statistics_tokens).chosen.cpu()
        self.log.append({"round": self.round + 1, "taken": []})

    def draw(self, tokens: int) -> nmbench.Batch:
        """Return windows of the pool with about `tokens` tokens, at least one window."""
        pool = self.task.pool
        return next(self.task.batches(max(1, tokens // pool.shape[1]), self.task.generator, pool))

    def visit_blocks(self) -> None:
        """Walk once over the remaining blocks of this round."""
        task, total = self.task, len(self.task.bundle.blocks)
        judge = None
        for step in walk(
            task.bundle,
            task.pool[self.statistics.to(task.pool.device)],
            self.needs,
            sequential=True,
            skip_tokens=self.method.skip_tokens,
            original=lambda layer: self.live.stored(layer.name),
            start=self.block,
        ):
            task.count_forward(step.block_tokens // total)
            self.few.note(step)
            if step.layers:
                judge = judge or self.new_judge(step.index)
                self.decide(step, judge)
            if step.last:
                judge, self.block = None, step.index + 1
                task.progress(f"round {self.round + 1} of {self.method.rounds}", self.block, total)
                late = time.perf_counter() - self.saved_at > self.checkpoint_seconds
                if self.block < total and (self.task.checkpoints.ending or late):
                    self.save()

    def new_judge(self, index: int) -> Judge:
        """Return a judge for one block, with new windows of the length for trying proposals."""
        tokens = self.draw(self.method.judge_tokens).tokens
        length = min(self.method.judge_window, tokens.shape[1])
        windows = tokens[:, : tokens.shape[1] // length * length].reshape(-1, length)
        if len(windows) < 2:
            raise nmbench.NMBenchError(
                f"{self.task.who} compares losses of windows and has one only; raise "
                f"--set {self.task.who}.judge_tokens to {2 * length} or more, and --pool-tokens if that is less."
            )
        return self.judge(self.task, index, windows, self.method.minibatch)

    def decide(self, step: Step, judge: Judge) -> None:
        """Take the best proposal for the layers of `step`, if clearly better than the present masks."""
        proposals = {layer.name: self.proposals(layer.name, step.stats[layer.name]) for layer in step.layers}
        known = [{name: self.masks[name] for name in proposals}]  # masks that need no further measurement
        trials = []
        for number, aim in enumerate(self.aims):
            masks = {name: masks[number] for name, masks in proposals.items()}
            if any(equal(masks, other) for other in known):
                continue
            known.append(masks)
            self.live.apply(masks)
            losses = judge.losses()
            if losses.isfinite().all():
                trials.append(Trial(aim, masks, losses))
        best = min(trials, key=lambda trial: float(trial.losses.mean()), default=None)
        if best is not None and judge.prefers(best.losses, self.method.margin):
            nats = float((best.losses - judge.present).mean())
            self.log[-1]["taken"].append({"layers": list(proposals), "aim": str(best.aim), "nats": round(nats, 5)})
            self.masks.update(best.masks)
            judge.present = best.losses
        self.live.apply({name: self.masks[name] for name in proposals})

    def proposals(self, name: str, stats: nmbench.LayerStats) -> list[Tensor]:
        """Return the masks that swaps reach from the present mask of a layer, one for every aim."""
        weight = self.live.original(name).float()
        size = max(1, AT_ONCE // weight.numel())
        chunks = [self.aims[start : start + size] for start in range(0, len(self.aims), size)]
        with full_float32():
            moved = weight @ stats.drift if stats.drift is not None else torch.zeros_like(weight)  # W D
            return [mask for aims in chunks for mask in self.swapped(name, weight, moved, stats, aims)]

    def swapped(
        self, name: str, weight: Tensor, moved: Tensor, stats: nmbench.LayerStats, aims: Sequence[Aim]
    ) -> list[Tensor]:
        """Return the proposals of some aims, which are swept together: the rows of the layer once for each aim."""
        assert stats.gram is not None
        linear = torch.cat([aim.linear(moved, stats.lag) for aim in aims])
        problem = Problem.of(weight.repeat(len(aims), 1), stats.gram, None, linear, self.task.pattern[name])
        dropped = (~self.masks[name]).t().float().repeat(1, len(aims))  # [in, aims * out]
        refined, _ = descend(problem, dropped, self.method.sweeps)
        return [(part == 0).t().contiguous() for part in refined.chunk(len(aims), dim=1)]

    def end_round(self) -> None:
        """Measure the first half of the selection windows, and keep the masks if no earlier masks were better."""
        self.round, self.block = self.round + 1, 0
        losses = self.losses(self.selection.looked_at, self.masks)
        held_out = float(losses.mean())
        self.log[-1].update(held_out=held_out, forward_tokens=self.task.cost.forward_tokens)
        self.selection.look(self.round, dict(self.masks), losses)
        self.task.report(self.round, masks=self.masks, held_out=held_out)

    def losses(self, windows: Tensor, masks: Masks) -> Tensor:
        """Return the losses float64 `[n]` of the model with `masks`. Raises `NumericalFailure` if one is not finite."""
        self.live.apply(masks)
        losses = self.task.loss(windows)
        if not losses.isfinite().all():
            raise nmbench.NumericalFailure(
                f"{self.task.who}: a loss on the selection windows is NaN or infinite; another --dtype may help."
            )
        return losses.double().cpu()

    def save(self) -> None:
        """Store everything that the rest of the run depends on."""
        kinds = {"masks": self.masks, "best": self.selection.best}
        masks = {f"{kind} {name}": pack(mask).cpu() for kind, of in kinds.items() for name, mask in of.items()}
        state = {name: getattr(self, name) for name in SAVED}
        best = {"best_round": self.selection.best_at, "best_losses": self.selection.best_losses}
        few = {"never_reached": self.few.never_reached, "under_calibrated": self.few.under_calibrated}
        tensors = {"statistics": self.statistics, "generator": self.task.generator.get_state()}
        self.task.checkpoints.save({**state, **best, **few, **masks, **tensors})
        self.saved_at = time.perf_counter()

    def unpacked(self, kind: str, saved: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the masks of one kind from a checkpoint, on the model's device."""
        device = self.task.bundle.device
        return {name: unpack(saved[f"{kind} {name}"].to(device), tuple(m.shape)) for name, m in self.masks.items()}

    def conclude(self) -> dict[str, Tensor]:
        """Return the masks by layer, and write the notes of the record."""
        masks = {name: mask.cpu() for name, mask in self.selection.verdict(self.losses).items()}
        self.task.notes.update(
            **self.selection.notes("judged"),
            best_round=self.selection.best_at,
            groups_changed=groups_changed(masks, self.task.initial, self.task.pattern),
            log=self.log,
        )
        self.task.experts = self.few.experts
        return masks


def equal(masks: Masks, others: Masks) -> bool:
    """Return whether masks of the same layers are equal."""
    return all(torch.equal(mask, others[name]) for name, mask in masks.items())
