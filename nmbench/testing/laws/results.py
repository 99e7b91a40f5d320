"""Laws of every method: what it returns."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nmbench.methods import Method, Scorer
from nmbench.models.bit_equality import same_bits
from nmbench.testing.laws.base import (
    KEPT,
    PASSED_OVER,
    Broken,
    Judgement,
    law,
    layers,
    one_or_other,
    raised,
    tasks,
    usual,
)
from nmbench.testing.watch import Seen


@law(Method, cases=usual)
def results_have_the_right_shape(seen: Seen) -> Judgement:
    """Masks, scores and weights have the shape `[out, in]` of the weight, and every layer has a mask."""
    if seen.error is not None:
        return PASSED_OVER
    for name, got, wanted in results(seen):
        if not isinstance(got, Tensor) or tuple(got.shape) != wanted:
            return Broken(f"{name} {described(got)}", f"a tensor of shape {wanted}")
    if isinstance(seen.output, dict) and set(seen.output) != set(seen.shapes):
        return Broken(f"masks for {sorted(map(str, seen.output))}", f"masks for {sorted(seen.shapes)}")
    return KEPT


@law(Method, cases=usual)
def results_have_the_right_dtype(seen: Seen) -> Judgement:
    """Masks are bool; scores and repaired weights are floating-point numbers."""
    if seen.error is not None:
        return PASSED_OVER
    for name, got, _ in results(seen):
        if isinstance(got, Tensor) and not (got.is_floating_point() if "mask" not in name else got.dtype is torch.bool):
            wanted = "torch.bool" if "mask" in name else "a floating-point dtype"
            return Broken(f"{name} of {got.dtype}", wanted)
    return KEPT


DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


@law(
    Method,
    cases=one_or_other(
        layers(pattern=("2:4", "1:2", "4:8"), device=DEVICES),
        lambda method: [dataclasses.replace(case, device=d) for d in DEVICES for case in tasks("2:4", "4:8")(method)],
    ),
)
def results_are_on_the_right_device(seen: Seen) -> Judgement:
    """Results are where the weights are (a learner's masks may be in host memory instead); CUDA too if there is one."""
    if seen.error is not None:
        return PASSED_OVER if seen.case.device == "cpu" else Broken(raised(seen), "a result, as on the CPU")
    allowed = {seen.case.device} if seen.task is None else {seen.case.device, "cpu"}
    for name, got, _ in results(seen):
        if isinstance(got, Tensor) and got.device.type not in allowed:
            return Broken(f"{name} on {got.device}", " or ".join(sorted(allowed)))
    return KEPT


@law(Method, cases=usual)
def same_seed_same_result(seen: Seen) -> Judgement:
    """The same call gives the same bits again, whatever random numbers others have drawn in between."""
    if seen.error is not None:
        return PASSED_OVER
    again = {name: got for name, got, _ in results(seen.again())}
    for name, got, _ in results(seen):
        other = again.get(name)
        if not isinstance(got, Tensor):
            continue
        if not isinstance(other, Tensor) or not same_bits(got, other):
            return Broken(f"another {name} the second time", "the same bits; a learner draws from `task.generator`")
    return KEPT


def results(seen: Seen) -> list[tuple[str, object, tuple[int, int]]]:
    """Everything returned, with its name and the shape that it should have."""
    if isinstance(seen.method, Scorer):
        return [("score", seen.output, seen.case.shape)]
    masks = seen.returned_masks
    found: list[tuple[str, object, tuple[int, int]]] = [
        (f"mask of {name}", masks.get(name), shape) for name, shape in seen.shapes.items()
    ]
    weight = getattr(seen.output, "weight", None)
    return found if weight is None else [*found, ("weight", weight, seen.case.shape)]


def described(value: object) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"is {value!r}"
