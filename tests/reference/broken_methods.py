"""Methods that keep every law of the kit, and for every law one that breaks this law and no other."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import nmbench
from nmbench.testing.cases import RecordingTask

calls = itertools.count()


# Methods that keep every law


@dataclass(frozen=True)
class GoodScorer(nmbench.Scorer):
    """Magnitude times the norm of the input channel."""

    needs = nmbench.Stat.INPUT_NORM
    power: float = nmbench.option(1.0, "exponent of the norm")

    def score(self, weight: Tensor, stats: nmbench.LayerStats) -> Tensor:
        return weight.float().abs() * stats.input_norm**self.power


@dataclass(frozen=True)
class GoodSolver(nmbench.Solver):
    """Magnitude, and for every row the least-squares repair of what is kept."""

    needs = nmbench.Stat.GRAM
    damping: float = nmbench.option(1e-3, "added to the diagonal of the Gram matrix, relative to its mean")

    def solve(self, weight: Tensor, stats: nmbench.LayerStats, pattern: nmbench.Pattern) -> nmbench.Pruned:
        dense = weight.double()
        mask = pattern.top(weight.float().abs())
        gram = stats.gram.double()
        gram = gram + self.damping * gram.diagonal().mean().clamp_min(1e-9) * torch.eye(len(gram))
        kept = mask.nonzero()[:, 1].view(len(dense), -1)  # [out, kept of a row]
        wanted = (dense @ gram).gather(1, kept)
        values = torch.linalg.solve(gram[kept[:, :, None], kept[:, None, :]], wanted)
        repaired = torch.zeros_like(dense).scatter(1, kept, values)
        return nmbench.Pruned(mask, (repaired + 0.0).to(weight.dtype))


@dataclass(frozen=True)
class GoodRefiner(nmbench.Refiner):
    """Exchanges the first two weights of every row, if it helps."""

    needs = nmbench.Stat.GRAM

    def refine(
        self, weight: Tensor, stats: nmbench.LayerStats, mask: Tensor, pattern: nmbench.Pattern
    ) -> nmbench.Pruned:
        work, gram, mask = weight.double(), stats.gram.double(), mask.clone()
        for row in range(len(work)):
            trial = torch.cat([mask[row, :2].flip(0), mask[row, 2:]])
            if self.error(work[row], trial, gram) < self.error(work[row], mask[row], gram):
                mask[row] = trial
        return nmbench.Pruned(mask)

    def error(self, row: Tensor, mask: Tensor, gram: Tensor) -> float:
        lost = row.masked_fill(mask, 0.0)
        return float(lost @ gram @ lost)


@dataclass(frozen=True)
class GoodLearner(nmbench.MaskLearner):
    """Random search: shuffles the masks of 24 groups of a layer, and keeps what does not raise the loss."""

    steps: int = nmbench.option(16, "shuffles tried", unit="steps")

    @torch.no_grad()
    def learn(self, task: nmbench.LearnTask) -> Mapping[str, Tensor]:
        state = task.checkpoints.load() or {"step": 0, **self.start(task)}
        masks = {name: state[name].clone() for name in task.layers}
        if "random" in state:
            task.generator.set_state(state["random"])
        with task.masked_weights() as live:
            least = self.loss(task, live, masks)
            for step in range(state["step"], self.steps):
                name = list(masks)[step % len(masks)]
                trial = {**masks, name: self.exchanged(masks[name], task, name)}
                if (loss := self.loss(task, live, trial)) <= least:
                    masks, least = trial, loss
                self.tell(task, step + 1, masks, least)
        return masks

    def start(self, task: nmbench.LearnTask) -> dict[str, Tensor]:
        return task.initial

    def loss(self, task: nmbench.LearnTask, live: Any, masks: dict[str, Tensor]) -> float:
        live.apply(masks)
        return float(task.loss(task.pool[:8]).mean())

    def tell(self, task: nmbench.LearnTask, step: int, masks: dict[str, Tensor], loss: float) -> None:
        task.report(step, masks=masks, loss=loss)
        if step % 4 == 0:
            task.checkpoints.save({"step": step, "random": task.generator.get_state(), **masks})

    def exchanged(self, mask: Tensor, task: nmbench.LearnTask, name: str) -> Tensor:
        group, unit, generator = task.pattern[name].units.group, task.pattern[name].unit, task.generator
        new = mask.clone().view(-1, group, unit)
        rows = torch.randperm(len(new), generator=generator)[:24]
        new[rows] = new[rows][:, torch.randperm(group, generator=generator)]
        return new.view(mask.shape)


@dataclass(frozen=True)
class GoodChooser(GoodLearner):
    """The same search; of its masks those are returned that are best by the selection windows."""

    steps: int = nmbench.option(24, "shuffles tried", unit="steps")

    @torch.no_grad()
    def learn(self, task: nmbench.LearnTask) -> Mapping[str, Tensor]:
        with task.masked_weights() as live:

            def losses(windows: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
                live.apply(masks)
                return task.loss(windows)

            selection = nmbench.Selection(task, task.initial, tolerance_nats=0.0)
            step, masks = self.begun(task, selection, losses)
            least = self.loss(task, live, masks)
            for at in range(step, self.steps):
                name = list(masks)[at % len(masks)]
                trial = {**masks, name: self.exchanged(masks[name], task, name)}
                if (loss := self.loss(task, live, trial)) <= least:
                    masks, least = trial, loss
                task.report(at + 1, masks=masks, loss=least)
                if (at + 1) % 4 == 0:
                    selection.look(at + 1, masks, losses(selection.looked_at, masks))
                    self.save(task, at + 1, masks, selection)
            selection.look(self.steps, masks, losses(selection.looked_at, masks))
            return selection.verdict(losses)

    def begun(self, task: nmbench.LearnTask, selection: Any, losses: Any) -> tuple[int, dict[str, Tensor]]:
        state = task.checkpoints.load()
        if state is None:
            selection.start(losses(selection.looked_at, task.initial))
            return 0, task.initial
        task.generator.set_state(state["random"])
        self.recall(selection, state, losses)
        return state["step"], {name: state[name] for name in task.layers}

    def save(self, task: nmbench.LearnTask, step: int, masks: dict[str, Tensor], selection: Any) -> None:
        state = {"step": step, "random": task.generator.get_state(), "selection": selection.state(), **masks}
        task.checkpoints.save(state)

    def recall(self, selection: Any, state: Mapping[str, Any], losses: Any) -> None:
        selection.restore(state["selection"])


GOOD = (GoodScorer(), GoodSolver(), GoodRefiner(), GoodLearner(), GoodChooser())


# One for every law


@dataclass(frozen=True)
class Forgetful(GoodScorer):
    """Changes its own option."""

    rounds: int = nmbench.option(3, "sweeps")

    def __post_init__(self) -> None:
        object.__setattr__(self, "rounds", self.rounds + 1)


@dataclass(frozen=True)
class Undescribed(GoodScorer):
    """Has an option without a help text."""

    secret: int = 3


@dataclass(frozen=True)
class NoDocstring(GoodScorer):
    pass


@dataclass(frozen=True)
class Illegal(GoodScorer):
    """Has a default that is none of its choices."""

    mode: str = nmbench.option("fast", "which way", choices=("slow", "slower"))


@dataclass(frozen=True)
class Speechless(GoodScorer):
    """Refuses a pattern without a reason."""

    def supports(self, pattern: nmbench.Pattern) -> Any:
        return False if pattern.group == 128 else None


@dataclass(frozen=True)
class Late(GoodSolver):
    """Finds out too late that it cannot do a pattern."""

    def solve(self, weight: Tensor, stats: nmbench.LayerStats, pattern: nmbench.Pattern) -> nmbench.Pruned:
        if pattern.group == 7:
            raise nmbench.NMBenchError("groups of 7 are impossible.")
        return super().solve(weight, stats, pattern)


@dataclass(frozen=True)
class LateLearner(GoodLearner):
    """Finds out too late that it cannot do a pattern."""

    def learn(self, task: nmbench.LearnTask) -> Mapping[str, Tensor]:
        if any(pattern.keep == 3 for pattern in task.pattern.values()):
            raise nmbench.NMBenchError("3 of 4 are impossible.")
        return super().learn(task)


@dataclass(frozen=True)
class Transposed(GoodScorer):
    """Returns scores of another shape for square weights."""

    def score(self, weight: Tensor, stats: nmbench.LayerStats) -> Tensor:
        score = super().score(weight, stats)
        return score.flatten() if weight.shape == (4, 8) else score


@dataclass(frozen=True)
class LosesALayer(GoodLearner):
    """Forgets the last layer at 1:2."""

    def learn(self, task: nmbench.LearnTask) -> Mapping[str, Tensor]:
        masks = dict(super().learn(task))
        if next(iter(task.pattern.values())).group == 2:
            masks.popitem()
        return masks


@dataclass(frozen=True)
class FloatMask(GoodSolver):
    """Returns ones and zeros instead of a bool mask."""

    def solve(self, weight: Tensor, stats: nmbench.LayerStats, pattern: nmbench.Pattern) -> nmbench.Pruned:
        result = super().solve(weight, stats, pattern)
        return nmbench.Pruned(result.mask.float(), result.weight)


@dataclass(frozen=True)
class Elsewhere(GoodSolver):
    """Returns a mask on another device at 1:2."""

    def solve(self, weight: Tensor, stats: nmbench.LayerStats, pattern: nmbench.Pattern) -> nmbench.Pruned:
        result = super().solve(weight, stats, pattern)
        return nmbench.Pruned(result.mask.to("meta" if pattern.group == 2 else "cpu"), result.weight)


@dataclass(frozen=True)
class InPlace(GoodScorer):
    """Works in the weight that it is lent."""

    def score(self, weight: Tensor, stats: nmbench.LayerStats) -> Tensor:
        score = super().score(weight, stats)
        stats.input_norm.mul_(2)
        return score


@dataclass(frozen=True)
class Vandal(GoodLearner):
    """Writes into the dense weights instead of the live ones."""

    def learn(self, task: nmbench.LearnTask) -> Mapping[str, Tensor]:
        masks = super().learn(task)
        task.dense[next(iter(task.layers))].mul_(1.5)
        return masks


@dataclass(frozen=True)
class Whimsical(GoodSolver):
    """Repairs a little differently every time."""

    def solve(self, weight: Tensor, stats: nmbench.LayerStats, pattern: nmbench.Pattern) -> nmbench.Pruned:
        result = super().solve(weight, stats, pattern)
        return nmbench.Pruned(result.mask, result.weight * (1 + 1e-4 * (next(calls) % 3)))


@dataclass(frozen=True)
class Seeding(GoodScorer):
    """Sets the global random state."""

    def score(self, weight: Tensor, stats: nmbench.LayerStats) -> Tensor:
        np.random.seed(0)
        return super().score(weight, stats)


@dataclass(frozen=True)
class Setting(GoodScorer):
    """Leaves another default dtype behind."""

    def score(self, weight: Tensor, stats: nmbench.LayerStats) -> Tensor:
        torch.set_default_dtype(torch.bfloat16)
        return super().score(weight, stats)


@dataclass(frozen=True)
class Talkative(GoodLearner):
    """Prints what it does."""

    def learn(self, task: nmbench.LearnTask) -> Mapping[str, Tensor]:
        print("learning")
        return super().learn(task)


@dataclass(frozen=True)
class Brittle(GoodSolver):
    """Divides by the largest weight."""

    def solve(self, weight: Tensor, stats: nmbench.LayerStats, pattern: nmbench.Pattern) -> nmbench.Pruned:
        1.0 / float(weight.double().abs().max())
        return super().solve(weight, stats, pattern)


@dataclass(frozen=True)
class Rounded(GoodScorer):
    """Squares in the dtype of the weight."""

    def score(self, weight: Tensor, stats: nmbench.LayerStats) -> Tensor:
        return weight * weight * stats.input_norm.to(weight.dtype)


@dataclass(frozen=True)
class OnlyFloat(GoodSolver):
    """Knows no half precision."""

    def solve(self, weight: Tensor, stats: nmbench.LayerStats, pattern: nmbench.Pattern) -> nmbench.Pruned:
        if weight.dtype is torch.bfloat16:
            raise RuntimeError('"linalg_solve" not implemented for BFloat16')
        return super().solve(weight, stats, pattern)


@dataclass(frozen=True)
class Generous(GoodRefiner):
    """Keeps one weight more where all are equal."""

    def refine(
        self, weight: Tensor, stats: nmbench.LayerStats, mask: Tensor, pattern: nmbench.Pattern
    ) -> nmbench.Pruned:
        result = super().refine(weight, stats, mask, pattern)
        if pattern.keep == 1:
            result.mask[0, : pattern.group] = True
        return result


@dataclass(frozen=True)
class Dividing(GoodScorer):
    """Rates weights relative to the sum of their row, which may be zero."""

    def score(self, weight: Tensor, stats: nmbench.LayerStats) -> Tensor:
        size = weight.float().abs()
        return size / size.sum(1, keepdim=True) * stats.input_norm


@dataclass(frozen=True)
class UpperRows(GoodScorer):
    """Rates the upper rows higher."""

    def score(self, weight: Tensor, stats: nmbench.LayerStats) -> Tensor:
        return super().score(weight, stats) / torch.arange(1, len(weight) + 1)[:, None]


@dataclass(frozen=True)
class LeftColumns(GoodScorer):
    """Rates the left columns higher."""

    def score(self, weight: Tensor, stats: nmbench.LayerStats) -> Tensor:
        return super().score(weight, stats) / torch.arange(1, weight.shape[1] + 1)


@dataclass(frozen=True)
class Signed(GoodScorer):
    """Takes small for negative."""

    def score(self, weight: Tensor, stats: nmbench.LayerStats) -> Tensor:
        return weight.float() * stats.input_norm


@dataclass(frozen=True)
class Threshold(GoodScorer):
    """Cannot tell large weights apart."""

    def score(self, weight: Tensor, stats: nmbench.LayerStats) -> Tensor:
        return weight.float().abs().clamp(max=1.0) * stats.input_norm


@dataclass(frozen=True)
class Leftover(GoodSolver):
    """Leaves small weights where none should be."""

    def solve(self, weight: Tensor, stats: nmbench.LayerStats, pattern: nmbench.Pattern) -> nmbench.Pruned:
        result = super().solve(weight, stats, pattern)
        return nmbench.Pruned(result.mask, result.weight + 1e-3 * ~result.mask)


@dataclass(frozen=True)
class NegativeZeros(GoodSolver):
    """Leaves zeros with the sign of the weight."""

    def solve(self, weight: Tensor, stats: nmbench.LayerStats, pattern: nmbench.Pattern) -> nmbench.Pruned:
        result = super().solve(weight, stats, pattern)
        return nmbench.Pruned(result.mask, torch.where(result.mask, result.weight, -0.0))


@dataclass(frozen=True)
class NotANumber(GoodSolver):
    """Gives NaN where a row is zero."""

    def solve(self, weight: Tensor, stats: nmbench.LayerStats, pattern: nmbench.Pattern) -> nmbench.Pruned:
        result = super().solve(weight, stats, pattern)
        zero = (weight == 0).all(dim=1, keepdim=True) & result.mask
        return nmbench.Pruned(result.mask, result.weight.masked_fill(zero, torch.nan))


@dataclass(frozen=True)
class Overdone(GoodSolver):
    """Repairs far too much."""

    def solve(self, weight: Tensor, stats: nmbench.LayerStats, pattern: nmbench.Pattern) -> nmbench.Pruned:
        result = super().solve(weight, stats, pattern)
        return nmbench.Pruned(result.mask, 3 * result.weight)


@dataclass(frozen=True)
class Worsening(GoodRefiner):
    """Takes the smallest weights."""

    def refine(
        self, weight: Tensor, stats: nmbench.LayerStats, mask: Tensor, pattern: nmbench.Pattern
    ) -> nmbench.Pruned:
        return nmbench.Pruned(pattern.top(-weight.float().abs()))


@dataclass(frozen=True)
class Repairing(GoodRefiner):
    """Returns weights as well."""

    def refine(
        self, weight: Tensor, stats: nmbench.LayerStats, mask: Tensor, pattern: nmbench.Pattern
    ) -> nmbench.Pruned:
        result = super().refine(weight, stats, mask, pattern)
        return nmbench.Pruned(result.mask, weight.masked_fill(~result.mask, 0.0))


@dataclass(frozen=True)
class FirstPattern(GoodLearner):
    """Takes the pattern of the first layer for that of all."""

    def learn(self, task: nmbench.LearnTask) -> Mapping[str, Tensor]:
        masks, first = super().learn(task), next(iter(task.pattern.values()))
        if len(set(task.pattern.values())) == 1:
            return masks
        return {name: first.top(task.dense[name].abs()) for name in masks}


@dataclass(frozen=True)
class NeverStreamed(GoodLearner):
    """Says that it learns block by block, and returns the start where only one block is on the device."""

    @property
    def blockwise(self) -> bool:
        return True

    def learn(self, task: nmbench.LearnTask) -> Mapping[str, Tensor]:
        return task.initial if task.bundle.streaming else super().learn(task)


@dataclass(frozen=True)
class LooseReports(GoodLearner):
    """Reports masks on the way that are not strict."""

    def tell(self, task: nmbench.LearnTask, step: int, masks: dict[str, Tensor], loss: float) -> None:
        super().tell(task, step, {name: mask | (step == 3) for name, mask in masks.items()}, loss)


@dataclass(frozen=True)
class Starting(GoodLearner):
    """Starts from the largest weights, whatever the initial masks."""

    def start(self, task: nmbench.LearnTask) -> dict[str, Tensor]:
        return {name: task.pattern[name].top(task.dense[name].abs()) for name in task.layers}


@dataclass(frozen=True)
class Idle(GoodLearner):
    """Learns nothing."""

    def learn(self, task: nmbench.LearnTask) -> Mapping[str, Tensor]:
        super().learn(task)
        return task.initial


@dataclass(frozen=True)
class Amnesiac(GoodLearner):
    """Forgets its random numbers when it is interrupted."""

    def tell(self, task: nmbench.LearnTask, step: int, masks: dict[str, Tensor], loss: float) -> None:
        task.report(step, masks=masks, loss=loss)
        if step % 4 == 0:
            task.checkpoints.save({"step": step, **masks})


@dataclass(frozen=True)
class Undecided(GoodChooser):
    """Forgets the best masks so far when it is interrupted."""

    def recall(self, selection: Any, state: Mapping[str, Any], losses: Any) -> None:
        selection.start(losses(selection.looked_at, selection.initial))


@dataclass(frozen=True)
class Silent(GoodLearner):
    """Says nothing for all its life."""

    def tell(self, task: nmbench.LearnTask, step: int, masks: dict[str, Tensor], loss: float) -> None:
        pass


@dataclass(frozen=True)
class Uncounted(GoodLearner):
    """Looks at the model behind the host's back."""

    def learn(self, task: nmbench.LearnTask) -> Mapping[str, Tensor]:
        assert isinstance(task, RecordingTask)
        for _ in range(3):
            task.model(input_ids=task.pool)
        return super().learn(task)


BROKEN: dict[str, tuple[nmbench.Scorer | nmbench.Solver | nmbench.Refiner | nmbench.MaskLearner, ...]] = {
    "options_round_trip": (Forgetful(), Illegal()),
    "options_are_described": (Undescribed(), NoDocstring()),
    "impossible_patterns_have_reasons": (Speechless(),),
    "supported_patterns_are_done": (Late(), LateLearner()),
    "results_have_the_right_shape": (Transposed(), LosesALayer()),
    "results_have_the_right_dtype": (FloatMask(),),
    "results_are_on_the_right_device": (Elsewhere(),),
    "inputs_are_untouched": (InPlace(), Vandal()),
    "same_seed_same_result": (Whimsical(),),
    "global_random_state_is_untouched": (Seeding(),),
    "global_settings_are_untouched": (Setting(),),
    "nothing_is_printed": (Talkative(),),
    "hostile_values_are_survived": (Brittle(),),
    "half_precision_is_done": (Rounded(), OnlyFloat()),
    "masks_are_strict": (Generous(),),
    "scores_are_finite": (Dividing(),),
    "row_order_does_not_matter": (UpperRows(),),
    "channel_order_does_not_matter": (LeftColumns(),),
    "channel_signs_do_not_matter": (Signed(),),
    "scale_does_not_matter": (Threshold(),),
    "weights_are_zero_off_the_mask": (Leftover(), NegativeZeros()),
    "weights_are_finite": (NotANumber(),),
    "repair_does_not_hurt": (Overdone(),),
    "masks_do_not_get_worse": (Worsening(),),
    "weights_stay_dense": (Repairing(),),
    "learnt_masks_are_strict": (FirstPattern(),),
    "reported_masks_are_strict": (LooseReports(),),
    "zero_steps_return_the_initial_mask": (Starting(),),
    "planted_problem_improves": (Idle(),),
    "interrupted_runs_resume": (Amnesiac(), Undecided(), Silent()),
    "blockwise_learners_stream": (NeverStreamed(),),
    "tokens_are_counted": (Uncounted(),),
}
