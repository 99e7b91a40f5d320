"""Laws of mask learners, on the planted model (`nmbench.testing.planted`)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from torch import Tensor

from nmbench.methods import MaskLearner, Method
from nmbench.testing.cases import LearnCase
from nmbench.testing.laws.base import (
    KEPT,
    PASSED_OVER,
    PLANTED_PATTERNS,
    Broken,
    Judgement,
    law,
    raised,
    supported,
    tasks,
)
from nmbench.testing.planted import VOCABULARY, Planted, planted_bundle, planted_loss
from nmbench.testing.values import values
from nmbench.testing.watch import Seen, interrupted, watch


def mixed(method: Method) -> list[LearnCase]:
    """Every supported pattern, and two patterns in one model."""
    both = LearnCase("2:4", "1:4")  # a 2:4 mask would do for 4:8
    return [
        *tasks(*PLANTED_PATTERNS)(method),
        *([both] if supported(method, "2:4") and supported(method, "1:4") else []),
    ]


@law(MaskLearner, cases=mixed)
def learnt_masks_are_strict(seen: Seen) -> Judgement:
    """The masks returned keep exactly N of every M weights, each layer by its own pattern."""
    if seen.error is not None or not seen.masks:
        return PASSED_OVER
    return strict(seen, seen.masks, "the masks returned")


@law(MaskLearner, cases=mixed)
def reported_masks_are_strict(seen: Seen) -> Judgement:
    """Masks that are reported on the way are strict at every step; none need be reported."""
    assert seen.task
    for report in seen.task.reported:
        legible = {name: mask for name, mask in (report.masks or {}).items() if seen.legible(name, mask)}
        if isinstance(verdict := strict(seen, legible, f"the masks reported at step {report.step}"), Broken):
            return verdict
    return KEPT if seen.error is None else PASSED_OVER


def strict(seen: Seen, masks: Mapping[str, Tensor], what: str) -> Judgement:
    """Judge whether all of `masks` keep exactly N of every M weights."""
    assert seen.task
    for name, mask in masks.items():
        pattern = seen.task.pattern[name]
        broken = (pattern.kept(mask.bool()) != pattern.keep).nonzero()
        if len(broken):
            row, group = broken[0].tolist()
            return Broken(
                f"{what}: {int(pattern.kept(mask.bool())[row, group])} kept in {name}, row {row}, group {group}",
                f"{pattern.keep} ({pattern}) in every group",
            )
    return KEPT


@law(MaskLearner, cases=tasks("2:4", "4:8"), option="steps")
def zero_steps_return_the_initial_mask(seen: Seen) -> Judgement:
    """With its option `steps` at 0 a learner returns the masks that it started from."""
    method = dataclasses.replace(seen.method, steps=0)  # type: ignore[call-arg]
    none = watch(method, seen.case)
    if none.error is not None:
        return Broken(raised(none), "the initial masks", f"{method!r}.learn(task)")
    initial = seen.case.task().initial
    for name, mask in none.masks.items():
        if not mask.cpu().bool().equal(initial[name]):
            return Broken(f"another mask of {name}", "that of task.initial", f"{method!r}.learn(task)")
    return KEPT if none.masks else PASSED_OVER


def two_seeds(method: Method) -> list[LearnCase]:
    return [dataclasses.replace(case, seed=seed) for case in tasks("2:4", "4:8")(method) for seed in (0, 1)]


@law(MaskLearner, cases=two_seeds)
def planted_problem_improves(seen: Seen) -> Judgement:
    """From the worst masks of a model whose large weights are all it needs, a learner gets further than chance."""
    if seen.error is not None or set(seen.masks) != set(seen.shapes):
        return PASSED_OVER
    after = planted_loss({name: mask.cpu().bool() for name, mask in seen.masks.items()})
    chance = loss_by_chance(seen.case)
    if not after < chance:
        return Broken(
            f"a loss of {after:.4f} nats, {planted_loss(seen.case.task().initial):.4f} at the start",
            f"less than {chance:.4f}, the mean of random masks; give the learner options with which it learns from "
            "32 windows of 12 tokens",
        )
    return KEPT


@functools.cache
def loss_by_chance(case: LearnCase) -> float:
    """The mean loss of 64 random strict masks."""
    patterns = case.patterns(planted_bundle().layers)
    shape = (VOCABULARY, VOCABULARY)
    random = [
        {
            name: pattern.top(values("normal", shape, 64 * layer + k))
            for layer, (name, pattern) in enumerate(patterns.items())
        }
        for k in range(64)
    ]
    return sum(map(planted_loss, random)) / len(random)


@law(MaskLearner, cases=tasks("2:4"))
def interrupted_runs_resume(seen: Seen) -> Judgement:
    """Interrupted at any report or checkpoint and started again, a learner ends with the same masks."""
    if seen.error is not None or not seen.masks:
        return PASSED_OVER
    if seen.events == 0:
        return Broken(
            "no report and no checkpoint", "at least one `task.report(step, loss=...)`, or nobody knows it lives"
        )
    for event in sorted({seen.events * part // 4 for part in range(4)} | {seen.events - 1}):
        call = f"{seen.method!r}.learn(task), interrupted at event {event} of {seen.events}, and once more"
        try:
            resumed = interrupted(seen, event)
        except Exception as error:
            return Broken(f"{type(error).__name__}: {' '.join(str(error).split())}", "the same masks", call)
        for name, mask in seen.masks.items():
            if not isinstance(resumed, Mapping) or not mask.equal(resumed[name]):
                return Broken(f"another mask of {name}", "that of the run that was not interrupted", call)
    return KEPT


@law(MaskLearner, cases=tasks("2:4", "4:8"))
def tokens_are_counted(seen: Seen) -> Judgement:
    """Every token that is sent through the model is counted: by `task.loss`, or by `task.count_forward`."""
    assert seen.task
    assert isinstance(seen.task.model, Planted)
    sent, counted = seen.task.model.tokens_seen, seen.task.settle().forward_tokens
    if counted < sent:
        return Broken(f"{counted} tokens counted", f"at least the {sent} that the model was shown")
    return KEPT if seen.error is None else PASSED_OVER
