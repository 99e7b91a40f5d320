"""Laws of repairs: of one layer on its statistics, of blocks and of the whole model on the planted one.

A repair on the planted model (`nmbench.testing.planted`) begins with the best masks and with half of the dense weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from unittest import mock

from torch import Tensor

from nmbench.methods import BlockRepair, LayerRepair, Pruned, Repair, WeightLearner
from nmbench.models.bit_equality import same_bits
from nmbench.pruning.training import Training
from nmbench.testing.cases import INPUTS, LearnCase
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
    layers,
    numbered,
    one_or_other,
    raised,
    tasks,
)
from nmbench.testing.laws.layerwise import output_error
from nmbench.testing.observation import Observation, observe
from nmbench.testing.planted import weighted_loss
from nmbench.testing.values import KINDS

APART = 0.01  # share of what a repair gains, by which results of other batches may differ
finite_kinds = tuple(kind for kind in KINDS if kind != "huge")
every = one_or_other(
    layers(pattern=("2:4", "1:4", "4:8"), kind=finite_kinds, inputs=INPUTS), tasks(*PLANTED_PATTERNS, second="1:4")
)


@law(LayerRepair, WeightLearner, cases=every)
def the_mask_stays(observed: Observation) -> Judgement:
    """A repair returns the mask that it began with; one that says that it `chooses` returns a strict mask."""
    assert isinstance(observed.method, Repair)
    for name, mask in observed.masks.items():
        start = observed.start.layers[name].mask
        if observed.method.chooses:
            pattern = observed.task.pattern[name] if observed.task else observed.case.nm
            if found := breach(mask.cpu().bool(), pattern):
                return Broken(f"a mask of {name} with {found[0]}", found[1])
        elif not mask.cpu().bool().equal(start.cpu()):
            differ = int((mask.cpu().bool() != start.cpu()).sum())
            return Broken(f"another mask of {name}, in {differ} places", "that of the start")
    return HOLDS if observed.masks and observed.error is None else SKIPPED


@law(Repair, cases=every)
def dropped_weights_stay_zero(observed: Observation) -> Judgement:
    """Repaired weights are zero, without a sign, wherever the mask is False."""
    for name, weight in observed.weights.items():
        off = weight.cpu().masked_select(~mask_of(observed, name))
        if off.count_nonzero():
            return Broken(f"{int(off.count_nonzero())} non-zero weights off the mask of {name}", "0 off the mask")
        if off.signbit().any():
            return Broken(f"{int(off.signbit().sum())} negative zeros in {name}", "+0.0, as `masked_fill` leaves it")
    return HOLDS if observed.error is None else SKIPPED


@law(Repair, cases=every)
def repaired_weights_are_finite(observed: Observation) -> Judgement:
    """Repaired weights are finite, also with dead inputs, ties and outliers."""
    for name, weight in observed.weights.items():
        if not weight.isfinite().all():
            return Broken(f"NaN or infinite weights in {name}", "finite weights, or nmbench.NumericalFailure")
    return HOLDS if observed.error is None else SKIPPED


correlated = layers(
    pattern=("2:4", "1:4", "4:8"), inputs=("correlated", "plain"), rows=(32,), groups=(8,), shifted=(False,)
)


@law(Repair, cases=one_or_other(correlated, tasks("2:4", "4:8")))
def repairs_improve_their_start(observed: Observation) -> Judgement:
    """A repaired layer loses less of the dense output than its start; a repaired planted model has a lower loss."""
    weights = sound(observed)
    if weights is None:
        return SKIPPED
    before = {name: weight_of(pruned) for name, pruned in observed.start.layers.items()}
    if isinstance(observed.case, LearnCase):
        started, ended, what = weighted_loss(before), weighted_loss(weights), "a loss"
    else:
        started, ended = (output_error(observed, found["layer"]) for found in (before, weights))
        what = "an output error"
    if not ended < started:
        return Broken(f"{what} of {ended:.6g}", f"less than {started:.6g}, that of the start")
    return HOLDS


@law(Repair, cases=one_or_other(layers(inputs=("correlated",)), tasks("2:4", "4:8")), option="steps")
def zero_steps_return_the_start(observed: Observation) -> Judgement:
    """With its option `steps` at 0 a repair returns the weights of its start, bit for bit."""
    method = dataclasses.replace(observed.method, steps=0)  # type: ignore[call-arg]
    none = observe(method, observed.case)
    if none.error is not None:
        return Broken(raised(none), "the start", f"{observed.case!r}.run({method!r})")
    for name, pruned in none.start.layers.items():
        start, weight = weight_of(pruned), none.weights.get(name)
        if weight is None or not same_bits(weight.cpu().to(start.dtype), start.cpu()):
            return Broken(f"other weights of {name}", "those of the start", f"{observed.case!r}.run({method!r})")
    return HOLDS


@law(BlockRepair, WeightLearner, cases=tasks("2:4"))
def interrupted_repairs_resume(observed: Observation) -> Judgement:
    """Interrupted at any report, checkpoint or block and started again, a repair ends with the same weights."""
    weights = sound(observed)
    if weights is None:
        return SKIPPED
    if observed.events == 0:
        return Broken("no report and no checkpoint", "at least one `task.report(step, loss=...)`")
    return at_events(observed, lambda *events: resumed_elsewhere(observed, weights, *events))


def resumed_elsewhere(observed: Observation, weights: Mapping[str, Tensor], *events: int) -> Judgement:
    """Judge whether a repair that is interrupted at each of `events` ends with `weights`."""
    call = f"{observed.case!r}.run({observed.method!r}), {numbered(events, observed)}"
    try:
        results = interrupted(observed, *events) or {}
    except Exception as error:
        return Broken(f"{type(error).__name__}: {' '.join(str(error).split())}", "the same weights", call)
    resumed = {name: getattr(value, "weight", value) for name, value in results.items()}
    for name, weight in weights.items():
        if not isinstance(resumed.get(name), Tensor) or not same_bits(weight, resumed[name].to(weight.dtype)):
            return Broken(f"other weights of {name}", "those of the run that was not interrupted", call)
    return HOLDS


@law(WeightLearner, cases=tasks("2:4"))
def parts_of_a_minibatch_do_not_matter(observed: Observation) -> Judgement:
    """However many windows go through the model at once, a weight learner ends at the same loss, up to rounding."""
    weights = sound(observed)
    if weights is None:
        return SKIPPED
    with windows_at_once(1):
        again = sound(observed.again())
    call = f"{observed.case!r}.run({observed.method!r}), one window of a minibatch at a time"
    if again is None:
        return Broken("no result", "the same weights, up to rounding", call)
    started = weighted_loss({name: weight_of(pruned) for name, pruned in observed.start.layers.items()})
    ended, other = weighted_loss(weights), weighted_loss(again)
    if abs(ended - other) > APART * abs(started - ended):
        return Broken(f"a loss of {other:.6g}", f"{ended:.6g}, as with all windows at once", call)
    return HOLDS


@contextlib.contextmanager
def windows_at_once(count: int) -> Iterator[None]:
    """At most `count` windows go through the model at once."""
    with mock.patch.object(Training, "part_windows", return_value=count):
        yield


def sound(observed: Observation) -> Mapping[str, Tensor] | None:
    """The weights of every layer, if all are well-formed, finite and zero off the mask; else None."""
    weights: dict[str, Tensor] = observed.weights
    if observed.error is not None or set(weights) != set(observed.shapes):
        return None
    on = {name: weight.cpu().masked_fill(mask_of(observed, name), 0.0) for name, weight in weights.items()}
    if any(weight.count_nonzero() for weight in on.values()):
        return None
    return weights if all(bool(weight.isfinite().all()) for weight in weights.values()) else None


def mask_of(observed: Observation, name: str) -> Tensor:
    """The mask that the result of a layer has: the returned one, or that of the start."""
    return observed.masks.get(name, observed.start.layers[name].mask).cpu().bool()


def weight_of(pruned: Pruned) -> Tensor:
    assert pruned.weight is not None
    return pruned.weight
