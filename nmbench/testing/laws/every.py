"""Laws of every method."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nmbench.errors import NMBenchError
from nmbench.methods import Method, Scorer
from nmbench.options import build, describe, resolved
from nmbench.pattern import Pattern
from nmbench.testing.laws.base import (
    KEPT,
    PASSED_OVER,
    PATTERNS,
    PLANTED_PATTERNS,
    Broken,
    Judgement,
    law,
    layers,
    no_call,
    one_or_other,
    tasks,
)
from nmbench.testing.watch import Seen, same_bits

usual = one_or_other(layers(pattern=("2:4", "4:8", "1:2"), inputs=("plain", "correlated")), tasks("2:4", "4:8", "1:2"))


@law(Method, cases=no_call)
def options_round_trip(seen: Seen) -> Judgement:
    """Options written down in a record and read back, as text or as values, give an equal method."""
    values = resolved(seen.method)
    for form, given in (("values", values), ("text", {name: as_text(value) for name, value in values.items()})):
        call = f"nmbench.options.build({type(seen.method).__name__}, {given!r}, 'label')"
        try:
            again = build(type(seen.method), given, "label")
        except Exception as error:
            return Broken(f"{type(error).__name__}: {error}", f"{seen.method!r}, from the {form} in a record", call)
        if again != seen.method:
            return Broken(repr(again), f"{seen.method!r}, from the {form} in a record", call)
    return KEPT


def as_text(value: object) -> str:
    return "none" if value is None else str(value)


@law(Method, cases=no_call)
def options_are_described(seen: Seen) -> Judgement:
    """Every option has a help text and the class a docstring, for `nmbench methods NAME`."""
    cls = type(seen.method)
    for info in describe(cls):
        if not info.help:
            return Broken(f"option {info.name} without a help text", 'nmbench.option(default, "what it does")')
    generated = (cls.__doc__ or "").startswith(f"{cls.__name__}(")  # what dataclass writes where there is none
    if generated or not cls.__doc__:
        return Broken("a class without a docstring", "one sentence that says what the method does")
    return KEPT


@law(Method, cases=no_call)
def impossible_patterns_have_reasons(seen: Seen) -> Judgement:
    """`supports` returns None or a reason for any pattern, the same whenever it is asked, and does not raise."""
    for text in (*PATTERNS, "1:64", "127:128", "1:3"):
        call = f"{seen.method!r}.supports(Pattern.parse({text!r}))"
        try:
            first, second = (seen.method.supports(Pattern.parse(text)) for _ in range(2))
        except Exception as error:
            return Broken(f"{type(error).__name__}: {error}", "None, or the reason as text", call)
        if first is not None and (not isinstance(first, str) or not first.strip()):
            return Broken(repr(first), "None, or the reason as text", call)
        if first != second:
            return Broken(f"{first!r}, then {second!r}", "the same answer twice", call)
    return KEPT


@law(Method, cases=one_or_other(layers(pattern=PATTERNS), tasks(*PLANTED_PATTERNS)))
def supported_patterns_are_done(seen: Seen) -> Judgement:
    """Whatever `supports` does not refuse beforehand is done: no pattern is found impossible when work has begun."""
    if seen.error is not None:
        return Broken(raised(seen), "a result, or a reason from `supports`, before any model is loaded")
    return KEPT


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
def inputs_are_untouched(seen: Seen) -> Judgement:
    """Weights, statistics, masks, tokens and the model are afterwards what they were before."""
    if seen.changed:
        return Broken(f"changed in place: {', '.join(seen.changed)}", "work on a copy, or inside `task.live_weights()`")
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


@law(Method, cases=usual)
def global_random_state_is_untouched(seen: Seen) -> Judgement:
    """The global random states of Python, NumPy and torch are neither set nor drawn from."""
    if seen.random_moved:
        return Broken(f"moved: {', '.join(seen.random_moved)}", "a generator of its own, such as `task.generator`")
    return KEPT


@law(Method, cases=usual)
def global_settings_are_untouched(seen: Seen) -> Judgement:
    """Default dtype and device, gradient mode, threads and precision of torch are left as they were."""
    if seen.settings_changed:
        return Broken(f"changed: {'; '.join(seen.settings_changed)}", "no change of what other methods depend on")
    return KEPT


@law(Method, cases=usual)
def nothing_is_printed(seen: Seen) -> Judgement:
    """Nothing is written to standard output, which belongs to the table of results."""
    if seen.stdout:
        return Broken(f"printed {seen.stdout[:60]!r}", "silence; logging, a note in `Pruned` or `task.report` instead")
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


def raised(seen: Seen) -> str:
    """The exception of a call, on one line."""
    text = " ".join(str(seen.error).split())
    return f"{type(seen.error).__name__}: {text}"


def refused(seen: Seen) -> bool:
    """Whether the method refused to go on in a way that the user of a run is told about in one line."""
    return isinstance(seen.error, NMBenchError)
