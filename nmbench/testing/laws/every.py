"""Laws of every method: its options and patterns."""

from __future__ import annotations

from nmbench.methods import Method
from nmbench.options import build, describe, resolved
from nmbench.pattern import Pattern
from nmbench.testing.laws.base import (
    HOLDS,
    PATTERNS,
    PLANTED_PATTERNS,
    Broken,
    Judgement,
    law,
    layers,
    no_call,
    one_or_other,
    raised,
    tasks,
)
from nmbench.testing.observation import Observation


@law(Method, cases=no_call)
def options_round_trip(observed: Observation) -> Judgement:
    """Options written down in a record and read back, as text or as values, give an equal method."""
    values = resolved(observed.method)
    for form, given in (("values", values), ("text", {name: as_text(value) for name, value in values.items()})):
        call = f"nmbench.options.build({type(observed.method).__name__}, {given!r}, 'label')"
        try:
            again = build(type(observed.method), given, "label")
        except Exception as error:
            return Broken(f"{type(error).__name__}: {error}", f"{observed.method!r}, from the {form} in a record", call)
        if again != observed.method:
            return Broken(repr(again), f"{observed.method!r}, from the {form} in a record", call)
    return HOLDS


def as_text(value: object) -> str:
    return "none" if value is None else str(value)


@law(Method, cases=no_call)
def options_are_described(observed: Observation) -> Judgement:
    """Every option has a help text and the class a docstring, for `nmbench methods NAME`."""
    cls = type(observed.method)
    for info in describe(cls):
        if not info.help:
            return Broken(f"option {info.name} without a help text", 'nmbench.option(default, "what it does")')
    generated = (cls.__doc__ or "").startswith(f"{cls.__name__}(")  # what dataclass writes where there is none
    if generated or not cls.__doc__:
        return Broken("a class without a docstring", "one sentence that says what the method does")
    return HOLDS


@law(Method, cases=no_call)
def impossible_patterns_have_reasons(observed: Observation) -> Judgement:
    """`supports` returns None or a reason for any pattern, the same whenever it is asked, and does not raise."""
    for text in (*PATTERNS, "1:64", "127:128", "1:3"):
        call = f"{observed.method!r}.supports(Pattern.parse({text!r}))"
        try:
            first, second = (observed.method.supports(Pattern.parse(text)) for _ in range(2))
        except Exception as error:
            return Broken(f"{type(error).__name__}: {error}", "None, or the reason as text", call)
        if first is not None and (not isinstance(first, str) or not first.strip()):
            return Broken(repr(first), "None, or the reason as text", call)
        if first != second:
            return Broken(f"{first!r}, then {second!r}", "the same answer twice", call)
    return HOLDS


@law(Method, cases=one_or_other(layers(pattern=PATTERNS), tasks(*PLANTED_PATTERNS)))
def supported_patterns_are_done(observed: Observation) -> Judgement:
    """Every pattern that `supports` accepts is pruned: none is found impossible when work has begun."""
    if observed.error is not None:
        return Broken(raised(observed), "a result, or a reason from `supports`, before any model is loaded")
    return HOLDS
