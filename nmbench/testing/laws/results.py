"""Laws of every method: its results."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nmbench.methods import BlockRepair, Method, Scorer
from nmbench.models.bit_equality import same_bits
from nmbench.testing.cases import LayerCase
from nmbench.testing.laws.base import (
    HOLDS,
    SKIPPED,
    Broken,
    Judgement,
    law,
    layers,
    one_or_other,
    raised,
    tasks,
    usual,
)
from nmbench.testing.observation import Observation
from nmbench.testing.planted import planted_bundle


@law(Method, cases=usual)
def results_have_the_right_shape(observed: Observation) -> Judgement:
    """Masks, scores and weights have the shape `[out, in]` of the weight, and every layer has a mask."""
    if observed.error is not None:
        return SKIPPED
    for name, got, wanted in results(observed):
        if not isinstance(got, Tensor) or tuple(got.shape) != wanted:
            return Broken(f"{name} {described(got)}", f"a tensor of shape {wanted}")
    if isinstance(observed.output, dict) and not names_are_right(observed):
        return Broken(f"results for {sorted(map(str, observed.output))}", f"results for {sorted(observed.shapes)}")
    return HOLDS


def names_are_right(observed: Observation) -> bool:
    """True if a learner returned every layer, and a block repair nothing but parameters of the model."""
    if isinstance(observed.method, BlockRepair):
        return set(observed.output) <= set(planted_bundle().tensors()) | set(observed.shapes)
    return set(observed.output) == set(observed.shapes)


@law(Method, cases=usual)
def results_have_the_right_dtype(observed: Observation) -> Judgement:
    """Masks are bool; scores and repaired weights are floating-point numbers."""
    if observed.error is not None:
        return SKIPPED
    for name, got, _ in results(observed):
        if isinstance(got, Tensor) and not (got.is_floating_point() if "mask" not in name else got.dtype is torch.bool):
            wanted = "torch.bool" if "mask" in name else "a floating-point dtype"
            return Broken(f"{name} of {got.dtype}", wanted)
    return HOLDS


DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


@law(
    Method,
    cases=one_or_other(
        layers(pattern=("2:4", "1:2", "4:8"), device=DEVICES),
        lambda method: [dataclasses.replace(case, device=d) for d in DEVICES for case in tasks("2:4", "4:8")(method)],
    ),
)
def results_are_on_the_right_device(observed: Observation) -> Judgement:
    """Results are where the weights are (a learner's masks may be in host memory instead); CUDA too if there is one."""
    if observed.error is not None:
        return SKIPPED if observed.case.device == "cpu" else Broken(raised(observed), "a result, as on the CPU")
    allowed = {observed.case.device} if isinstance(observed.case, LayerCase) else {observed.case.device, "cpu"}
    for name, got, _ in results(observed):
        if isinstance(got, Tensor) and got.device.type not in allowed:
            return Broken(f"{name} on {got.device}", " or ".join(sorted(allowed)))
    return HOLDS


@law(Method, cases=usual)
def same_seed_same_result(observed: Observation) -> Judgement:
    """The same call gives the same bits again, whatever random numbers others have drawn in between."""
    if observed.error is not None:
        return SKIPPED
    again = {name: got for name, got, _ in results(observed.again())}
    for name, got, _ in results(observed):
        other = again.get(name)
        if not isinstance(got, Tensor):
            continue
        if not isinstance(other, Tensor) or not same_bits(got, other):
            return Broken(f"another {name} the second time", "the same bits; a learner draws from `task.generator`")
    return HOLDS


def results(observed: Observation) -> list[tuple[str, object, tuple[int, int]]]:
    """Every tensor of the result: its name, the tensor, and its expected shape."""
    if isinstance(observed.method, Scorer):
        return [("score", observed.output, observed.case.shape)]
    masks, shapes = observed.returned_masks, observed.shapes
    found: list[tuple[str, object, tuple[int, int]]] = [
        (f"mask of {name}", masks.get(name), shape)
        for name, shape in shapes.items()
        if not isinstance(observed.method, BlockRepair)
    ]
    weights = observed.returned_weights
    named = ((f"weight of {name}" if len(shapes) > 1 else "weight", weights.get(name), shapes[name]) for name in shapes)
    return [*found, *((name, weight, shape) for name, weight, shape in named if weight is not None)]


def described(value: object) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"is {value!r}"
