"""Laws of one-shot methods, which prune one layer at a time."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable

import torch
from torch import Tensor

from nmbench.methods import LayerRepair, LayerStats, Pruned, Refiner, Scorer, Solver
from nmbench.pruning.one_shot import call
from nmbench.runtime.isolation import isolating
from nmbench.testing.cases import INPUTS
from nmbench.testing.laws.base import (
    HOLDS,
    PATTERNS,
    SKIPPED,
    Broken,
    Judgement,
    breach,
    law,
    layers,
    raised,
    refused,
)
from nmbench.testing.observation import Observation
from nmbench.testing.values import KINDS

Change = Callable[[Tensor, LayerStats], tuple[Tensor, LayerStats]]
HOSTILE = tuple(kind for kind in KINDS if kind != "normal")


@law(
    Scorer, Solver, Refiner, LayerRepair, cases=layers(pattern=("2:4", "4:8"), rows=(1, 5), inputs=INPUTS, kind=HOSTILE)
)
def hostile_values_are_survived(observed: Observation) -> Judgement:
    """Ties, zeros, outliers, huge and subnormal weights, dead inputs: a result or an `NMBenchError`, no other error."""
    if observed.error is None or refused(observed):
        return HOLDS
    return Broken(raised(observed), "a result, or nmbench.NumericalFailure where going on would mean another algorithm")


@law(Scorer, Solver, Refiner, LayerRepair, cases=layers(rows=(256,), groups=(16,), dtype=("bfloat16", "float16")))
def half_precision_is_done(observed: Observation) -> Judgement:
    """Half-precision weights are pruned; a scorer rates them as the float32 numbers that they stand for."""
    if observed.error is not None:
        return Broken(raised(observed), "a result, as for float32 weights")
    if not isinstance(observed.method, Scorer):
        return HOLDS
    score, exact = observed.score, score_of(observed, lambda weight, stats: (weight.float(), stats))
    if score is None or exact is None or not (score.isfinite().all() and exact.isfinite().all()):
        return SKIPPED
    differ = int((observed.case.nm.top(score) != observed.case.nm.top(exact)).sum())
    if differ:
        return Broken(
            f"a mask that differs in {differ} places from that of the same numbers in float32",
            "the same mask; compute with `weight.float()`, so that no score is rounded to a tie",
        )
    return HOLDS


def score_of(observed: Observation, change: Change) -> Tensor | None:
    """The scores of a case's layer after `change`, None if they are malformed."""
    assert isinstance(observed.method, Scorer)
    case = observed.case
    with isolating(), contextlib.redirect_stdout(io.StringIO()):
        weight, stats = change(case.weight(), case.stats(observed.method.needs))
        score = call(observed.method, weight, stats, case.nm, case.mask())
    return score if isinstance(score, Tensor) and score.shape == weight.shape else None


@law(Solver, Refiner, cases=layers(pattern=PATTERNS, kind=KINDS))
def masks_are_strict(observed: Observation) -> Judgement:
    """A mask keeps exactly N of every M weights or units, for every supported pattern and whatever the weights."""
    if observed.error is not None or "layer" not in observed.masks:
        return SKIPPED
    if found := breach(observed.masks["layer"].bool(), observed.case.nm):
        return Broken(*found)
    return HOLDS


def output_error(observed: Observation, weight: Tensor) -> float:
    """The squared error of the layer's output, float64: the sum over rows of (w - w') X^T X (w - w')^T."""
    x = observed.case.tokens().double()
    return float((x @ (observed.case.weight().double() - weight.double()).T).square().sum())


def masked(observed: Observation, mask: Tensor) -> Tensor:
    """The dense weight where `mask` is True, zero elsewhere."""
    return torch.where(mask.bool(), observed.case.weight(), 0.0)


def pruned(observed: Observation) -> Pruned | None:
    """The result of a solver or refiner, None unless its mask is well-formed."""
    return observed.output if isinstance(observed.output, Pruned) and "layer" in observed.masks else None
