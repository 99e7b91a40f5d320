"""Laws of mask learners, on the planted model (`nmbench.testing.planted`)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from torch import Tensor

from nmbench.methods import MaskLearner, Method, WeightLearner
from nmbench.testing.cases import LearnCase
from nmbench.testing.interruption import interrupted
from nmbench.testing.laws.base import (
    HOLDS,
    PLANTED_PATTERNS,
    SKIPPED,
    Broken,
    Judgement,
    at_events,
    breach,
    law,
    numbered,
    raised,
    supported,
    tasks,
)
from nmbench.testing.observation import Observation, observe
from nmbench.testing.planted import VOCABULARY, Planted, planted_bundle, planted_loss
from nmbench.testing.values import values

TURN = 2.4  # nats, between the 2.77 of the initial masks and the 2.13 of random ones, which every learner gets below


def mixed(method: Method) -> list[LearnCase]:
    """Tasks at every supported pattern, and one with two patterns in one model."""
    both = LearnCase("2:4", "1:4")  # a 2:4 mask would do for 4:8
    return [
        *tasks(*PLANTED_PATTERNS)(method),
        *([both] if supported(method, "2:4") and supported(method, "1:4") else []),
    ]


@law(MaskLearner, cases=mixed)
def learnt_masks_are_strict(observed: Observation) -> Judgement:
    """The masks returned keep exactly N of every M weights, each layer by its own pattern."""
    if observed.error is not None or not observed.masks:
        return SKIPPED
    return strict(observed, observed.masks, "the masks returned")


@law(MaskLearner, cases=mixed)
def reported_masks_are_strict(observed: Observation) -> Judgement:
    """Masks that are reported on the way are strict at every step; none need be reported."""
    assert observed.task
    for report in observed.task.reported:
        well_formed = {name: mask for name, mask in (report.masks or {}).items() if observed.well_formed(name, mask)}
        if isinstance(verdict := strict(observed, well_formed, f"the masks reported at step {report.step}"), Broken):
            return verdict
    return HOLDS if observed.error is None else SKIPPED


def strict(observed: Observation, masks: Mapping[str, Tensor], what: str) -> Judgement:
    """Judge whether all of `masks` keep exactly N of every M weights."""
    assert observed.task
    for name, mask in masks.items():
        if found := breach(mask.bool(), observed.task.pattern[name]):
            return Broken(f"{what}, {name}: {found[0]}", found[1])
    return HOLDS


@law(MaskLearner, cases=tasks("2:4", "4:8"), option="steps")
def zero_steps_return_the_initial_mask(observed: Observation) -> Judgement:
    """With its option `steps` at 0 a learner returns the masks that it started from."""
    method = dataclasses.replace(observed.method, steps=0)  # type: ignore[call-arg]
    none = observe(method, observed.case)
    if none.error is not None:
        return Broken(raised(none), "the initial masks", f"{method!r}.learn(task)")
    initial = observed.case.task().initial
    for name, mask in none.masks.items():
        if not mask.cpu().bool().equal(initial[name]):
            return Broken(f"another mask of {name}", "that of task.initial", f"{method!r}.learn(task)")
    return HOLDS if none.masks else SKIPPED


def two_seeds(method: Method) -> list[LearnCase]:
    return [dataclasses.replace(case, seed=seed) for case in tasks("2:4", "4:8")(method) for seed in (0, 1)]


@law(MaskLearner, cases=two_seeds)
def planted_problem_improves(observed: Observation) -> Judgement:
    """From the worst masks of a model whose large weights are all it needs, a learner gets further than chance."""
    if observed.error is not None or set(observed.masks) != set(observed.shapes):
        return SKIPPED
    after = planted_loss({name: mask.cpu().bool() for name, mask in observed.masks.items()})
    chance = mean_random_loss(observed.case)
    if not after < chance:
        return Broken(
            f"a loss of {after:.4f} nats, {planted_loss(observed.case.task().initial):.4f} at the start",
            f"less than {chance:.4f}, the mean of random masks; give the learner options with which it learns from "
            "32 windows of 12 tokens",
        )
    return HOLDS


@functools.cache
def mean_random_loss(case: LearnCase) -> float:
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


def turning(method: Method) -> list[LearnCase]:
    """A task whose best masks are the last ones, and one whose best masks are found on the way there."""
    return [task for case in tasks("2:4")(method) for task in (case, dataclasses.replace(case, turn=TURN))]


@law(MaskLearner, cases=turning)
def interrupted_runs_resume(observed: Observation) -> Judgement:
    """Interrupted at any report or checkpoint and started again, a learner ends with the same masks."""
    if observed.error is not None or not observed.masks:
        return SKIPPED
    if observed.events == 0:
        return Broken(
            "no report and no checkpoint", "at least one `task.report(step, loss=...)`, so that its progress is visible"
        )
    return at_events(observed, lambda *events: resumed_elsewhere(observed, *events))


def resumed_elsewhere(observed: Observation, *events: int) -> Judgement:
    """Judge whether a learner that is interrupted at each of `events` ends with the masks of the call."""
    call = f"{observed.method!r}.learn(task), {numbered(events, observed)}, and once more"
    try:
        resumed = interrupted(observed, *events)
    except Exception as error:
        return Broken(f"{type(error).__name__}: {' '.join(str(error).split())}", "the same masks", call)
    for name, mask in observed.masks.items():
        if not isinstance(resumed, Mapping) or not mask.equal(resumed[name]):
            return Broken(f"another mask of {name}", "that of the run that was not interrupted", call)
    return HOLDS


@law(MaskLearner, cases=tasks("2:4"))
def blockwise_learners_stream(observed: Observation) -> Judgement:
    """A learner that says that it is `blockwise` has the same masks where only one block is on the device."""
    assert isinstance(observed.method, MaskLearner) and isinstance(observed.case, LearnCase)
    if not observed.method.blockwise:
        return HOLDS
    streamed = observe(observed.method, dataclasses.replace(observed.case, streamed=True))
    call = f"{observed.method!r}.learn(task), with blocks on the host"
    if streamed.error is not None and observed.error is None:
        return Broken(raised(streamed), "the same masks", call)
    for name, mask in observed.masks.items():
        if name not in streamed.masks or not mask.equal(streamed.masks[name]):
            return Broken(f"another mask of {name}", "that of a model that is wholly on the device", call)
    return HOLDS if observed.masks else SKIPPED


@law(MaskLearner, WeightLearner, cases=tasks("2:4", "4:8"))
def tokens_are_counted(observed: Observation) -> Judgement:
    """Every token that is sent through the model is counted: by the task, or by `task.count_forward`."""
    assert observed.task
    assert isinstance(observed.task.model, Planted)
    sent, counted = observed.task.model.tokens_seen, observed.task.settle().forward_tokens
    if counted < sent:
        return Broken(f"{counted} tokens counted", f"at least the {sent} that the model received")
    return HOLDS if observed.error is None else SKIPPED
