"""Laws: a sentence, the kinds of method and the cases that it applies to, and a judgement of one call."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nmbench.errors import NMBenchError
from nmbench.methods import BlockRepair, MaskLearner, Method, WeightLearner
from nmbench.pattern import Pattern
from nmbench.testing.cases import LayerCase, LearnCase, variants
from nmbench.testing.observation import Observation

PATTERNS = ("1:2", "2:4", "1:4", "3:4", "2:3", "4:8", "3:7", "16:32", "2:4x2")  # usual, odd, wide, of pairs
PLANTED_PATTERNS = ("1:2", "2:4", "3:4", "4:8", "8:16", "2:4x2")  # those that 16 inputs fall into


OF_MODELS = (MaskLearner, BlockRepair, WeightLearner)


class Outcome(enum.Enum):
    """The judgements besides `Broken`."""

    HOLDS = "kept"
    SKIPPED = "passed over"  # nothing to judge: another law's business


HOLDS, SKIPPED = Outcome.HOLDS, Outcome.SKIPPED


@dataclass(frozen=True)
class Broken:
    """A judgement that a law does not hold, in words; `call` is the Python of a call other than the case's own."""

    got: str
    expected: str
    call: str = ""


Judgement = Outcome | Broken


@dataclass(frozen=True)
class Law:
    """One check: `judge` judges a call on each of `cases`, the simplest first. The name is the pytest id.

    With `option`, the law applies only to methods that have an option of that name.
    """

    name: str
    sentence: str
    kinds: tuple[type[Method], ...]
    cases: Callable[[Method], Sequence[Any]]
    judge: Callable[[Observation], Judgement]
    option: str = ""


@dataclass(frozen=True)
class NoCall:
    """The case of a law about the class, for which the method is not called."""


def law(
    *kinds: type[Method], cases: Callable[[Method], Sequence[Any]], option: str = ""
) -> Callable[[Callable[[Observation], Judgement]], Law]:
    """Make a law from a function that judges one call; the docstring of the function is the law in one sentence."""

    def made(judge: Callable[[Observation], Judgement]) -> Law:
        assert judge.__doc__
        return Law(judge.__name__, " ".join(judge.__doc__.split()), kinds, cases, judge, option)

    return made


def no_call(method: Method) -> list[NoCall]:
    return [NoCall()]


def layers(**choices: tuple[Any, ...]) -> Callable[[Method], list[LayerCase]]:
    """Layer cases with all combinations of the values in `choices`, at the patterns that the method supports."""
    return lambda method: [case for case in variants(LayerCase(), **choices) if supported(method, case.pattern)]


def tasks(*patterns: str, second: str = "") -> Callable[[Method], list[LearnCase]]:
    """Tasks on the planted model at those of `patterns` that the method supports."""

    def chosen(method: Method) -> list[LearnCase]:
        named = [(pattern, second) for pattern in patterns if supported(method, pattern)]
        return [LearnCase(pattern, other if other and supported(method, other) else "") for pattern, other in named]

    return chosen


def one_or_other(
    layer_cases: Callable[[Method], Sequence[Any]], learn_cases: Callable[[Method], Sequence[Any]]
) -> Callable[[Method], Sequence[Any]]:
    """Tasks for methods that need a model, layers for any other method."""
    return lambda method: learn_cases(method) if isinstance(method, OF_MODELS) else layer_cases(method)


def supported(method: Method, pattern: str) -> bool:
    return method.supports(Pattern.parse(pattern)) is None


def breach(mask: Tensor, pattern: Pattern) -> tuple[str, str] | None:
    """The first group of bool `mask` `[out, in]` that is not strict, and what it should be; None if all are."""
    broken = pattern.broken(mask).nonzero()
    if not len(broken):
        return None
    row, group = broken[0].tolist()
    units = f", in whole units of {pattern.unit}" if pattern.unit > 1 else ""
    kept = int(pattern.kept(mask)[row, group])
    return f"{kept} kept in row {row}, group {group}", f"{pattern.keep} ({pattern}) in every group{units}"


def raised(observed: Observation) -> str:
    """The exception of a call on one line."""
    text = " ".join(str(observed.error).split())
    return f"{type(observed.error).__name__}: {text}"


def refused(observed: Observation) -> bool:
    """True if the method raised `NMBenchError`, which a run prints in one line."""
    return isinstance(observed.error, NMBenchError)


def at_events(observed: Observation, differs: Callable[..., Judgement]) -> Judgement:
    """The judgement of `differs(*events)` on a run that is interrupted at its first, its last and three other events.

    If that is `Broken`, the first event is looked for that breaks the law alone.
    """
    events = sorted({observed.events * part // 4 for part in range(4)} | {observed.events - 1})
    verdict = differs(*events)
    if not isinstance(verdict, Broken):
        return verdict
    return next((alone for alone in map(differs, events) if isinstance(alone, Broken)), verdict)


def numbered(events: Sequence[int], observed: Observation) -> str:
    """The interruptions of a run in words: `interrupted at event 3 of 9`."""
    return f"interrupted at event {', '.join(map(str, events))} of {observed.events}"


# The cases of most laws
usual = one_or_other(layers(pattern=("2:4", "4:8", "1:2"), inputs=("plain", "correlated")), tasks("2:4", "4:8", "1:2"))
