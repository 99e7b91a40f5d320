"""What a law is: a sentence, the methods and cases that it is about, and a judgement of one call."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nmbench.errors import NMBenchError
from nmbench.methods import MaskLearner, Method
from nmbench.pattern import Pattern
from nmbench.testing.cases import LayerCase, LearnCase, variants
from nmbench.testing.watch import Seen

PATTERNS = ("1:2", "2:4", "1:4", "3:4", "2:3", "4:8", "3:7", "8:16", "16:32")  # usual, odd and wide ones
PLANTED_PATTERNS = ("1:2", "2:4", "1:4", "3:4", "4:8", "8:16")  # those that 16 inputs fall into


class Other(enum.Enum):
    """What a judgement may be besides `Broken`."""

    KEPT = "kept"
    PASSED_OVER = "passed over"  # nothing to judge: another law's business


KEPT, PASSED_OVER = Other.KEPT, Other.PASSED_OVER


@dataclass(frozen=True)
class Broken:
    """A judgement that a law does not hold, in words; `call` says what was called, if it is not the case's own call."""

    got: str
    expected: str
    call: str = ""


Judgement = Other | Broken


@dataclass(frozen=True)
class Law:
    """One check. `cases` are those that its `judge` is shown, the simplest first; the name is the pytest id."""

    name: str
    sentence: str
    kinds: tuple[type[Method], ...]
    cases: Callable[[Method], Sequence[Any]]
    judge: Callable[[Seen], Judgement]
    option: str = ""  # it has something to say to methods with this option only


@dataclass(frozen=True)
class NoCall:
    """The case of a law about the class, for which the method is not called."""


def law(
    *kinds: type[Method], cases: Callable[[Method], Sequence[Any]], option: str = ""
) -> Callable[[Callable[[Seen], Judgement]], Law]:
    """Make a law of a function that judges one call; its docstring is the law in one sentence."""

    def made(judge: Callable[[Seen], Judgement]) -> Law:
        assert judge.__doc__
        return Law(judge.__name__, " ".join(judge.__doc__.split()), kinds, cases, judge, option)

    return made


def no_call(method: Method) -> list[NoCall]:
    return [NoCall()]


def layers(**choices: tuple[Any, ...]) -> Callable[[Method], list[LayerCase]]:
    """All layers with the fields given, at those patterns that the method supports."""
    return lambda method: [case for case in variants(LayerCase(), **choices) if supported(method, case.pattern)]


def tasks(*patterns: str, second: str = "") -> Callable[[Method], list[LearnCase]]:
    """The planted model at those of `patterns` that the method supports."""

    def chosen(method: Method) -> list[LearnCase]:
        named = [(pattern, second) for pattern in patterns if supported(method, pattern)]
        return [LearnCase(pattern, other if other and supported(method, other) else "") for pattern, other in named]

    return chosen


def one_or_other(
    layer_cases: Callable[[Method], Sequence[Any]], learn_cases: Callable[[Method], Sequence[Any]]
) -> Callable[[Method], Sequence[Any]]:
    """Tasks for a mask learner, layers for any other method."""
    return lambda method: learn_cases(method) if isinstance(method, MaskLearner) else layer_cases(method)


def supported(method: Method, pattern: str) -> bool:
    return method.supports(Pattern.parse(pattern)) is None


def raised(seen: Seen) -> str:
    """The exception of a call, on one line."""
    text = " ".join(str(seen.error).split())
    return f"{type(seen.error).__name__}: {text}"


def refused(seen: Seen) -> bool:
    """Whether the method refused to go on in a way that the user of a run is told about in one line."""
    return isinstance(seen.error, NMBenchError)


# What most laws look at
usual = one_or_other(layers(pattern=("2:4", "4:8", "1:2"), inputs=("plain", "correlated")), tasks("2:4", "4:8", "1:2"))
