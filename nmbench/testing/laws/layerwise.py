"""Laws of one-shot methods, which prune one layer at a time."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable

import torch
from torch import Tensor

from nmbench.methods import LayerStats, Pruned, Refiner, Scorer, Solver
from nmbench.runtime.isolation import fenced
from nmbench.testing.cases import INPUTS, call
from nmbench.testing.laws.base import (
    KEPT,
    PASSED_OVER,
    PATTERNS,
    Broken,
    Judgement,
    law,
    layers,
    raised,
    refused,
)
from nmbench.testing.values import KINDS
from nmbench.testing.watch import Seen

Change = Callable[[Tensor, LayerStats], tuple[Tensor, LayerStats]]
HOSTILE = tuple(kind for kind in KINDS if kind != "normal")


@law(Scorer, Solver, Refiner, cases=layers(pattern=("2:4", "4:8"), rows=(1, 5), inputs=INPUTS, kind=HOSTILE))
def hostile_values_are_survived(seen: Seen) -> Judgement:
    """Ties, zeros, outliers, huge and subnormal weights, dead inputs: a result or an `NMBenchError`, no other error."""
    if seen.error is None or refused(seen):
        return KEPT
    return Broken(raised(seen), "a result, or nmbench.NumericalFailure where going on would mean another algorithm")


@law(Scorer, Solver, Refiner, cases=layers(rows=(256,), groups=(16,), dtype=("bfloat16", "float16")))
def half_precision_is_done(seen: Seen) -> Judgement:
    """Half-precision weights are pruned; a scorer rates them as the float32 numbers that they stand for."""
    if seen.error is not None:
        return Broken(raised(seen), "a result, as for float32 weights")
    if not isinstance(seen.method, Scorer):
        return KEPT
    score, exact = seen.score, score_of(seen, lambda weight, stats: (weight.float(), stats))
    if score is None or exact is None or not (score.isfinite().all() and exact.isfinite().all()):
        return PASSED_OVER
    differ = int((seen.case.nm.top(score) != seen.case.nm.top(exact)).sum())
    if differ:
        return Broken(
            f"a mask that differs in {differ} places from that of the same numbers in float32",
            "the same mask; compute with `weight.float()`, so that no score is rounded to a tie",
        )
    return KEPT


def score_of(seen: Seen, change: Change) -> Tensor | None:
    """The scores of the layer of a case after `change`."""
    assert isinstance(seen.method, Scorer)
    case = seen.case
    with fenced(), contextlib.redirect_stdout(io.StringIO()):
        weight, stats = change(case.weight(), case.stats(seen.method.needs))
        score = call(seen.method, weight, stats, case.mask(), case.nm)
    return score if isinstance(score, Tensor) and score.shape == weight.shape else None


@law(Solver, Refiner, cases=layers(pattern=PATTERNS, kind=KINDS))
def masks_are_strict(seen: Seen) -> Judgement:
    """A mask keeps exactly N of every M weights, for every supported pattern and whatever the weights."""
    if seen.error is not None or "layer" not in seen.masks:
        return PASSED_OVER
    kept = seen.case.nm.kept(seen.masks["layer"].bool())  # [out, in/group]
    if (kept != seen.case.nm.keep).any():
        row, group = (kept != seen.case.nm.keep).nonzero()[0].tolist()
        return Broken(
            f"{int(kept[row, group])} kept in row {row}, group {group}", f"{seen.case.nm.keep} in every group"
        )
    return KEPT


def output_error(seen: Seen, weight: Tensor) -> float:
    """sum over rows of (w - w') X^T X (w - w')^T, float64: what is lost at the layer's output."""
    x = seen.case.tokens().double()
    return float((x @ (seen.case.weight().double() - weight.double()).T).square().sum())


def masked(seen: Seen, mask: Tensor) -> Tensor:
    """The dense weight where kept, zero elsewhere."""
    return torch.where(mask.bool(), seen.case.weight(), 0.0)


def pruned(seen: Seen) -> Pruned | None:
    """What a solver or refiner returned, if its mask can be read."""
    return seen.output if isinstance(seen.output, Pruned) and "layer" in seen.masks else None
