"""The text of a failed check: the law, the call, the result, the expected result, and code that repeats the call."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nmbench.methods import Method
    from nmbench.testing.laws.base import Broken, Law
    from nmbench.testing.observation import Observation


class CheckFailed(AssertionError):
    """A method breaks a law of the kit."""


def failure_text(law: Law, observed: Observation, broken: Broken) -> str:
    """The whole message; its last lines are Python that repeats the call."""
    lines = [
        f"{type(observed.method).__name__} breaks {law.name}: {law.sentence}",
        f"  call:     {broken.call or call_text(observed)}",
        f"  got:      {broken.got}",
        f"  expected: {broken.expected}",
        "  see it with:",
        *(f"    {line}" for line in snippet(observed)),
    ]
    return "\n".join(lines)


def call_text(observed: Observation) -> str:
    """Python of the observed call, or the method alone where the law calls none."""
    from nmbench.testing.laws.base import NoCall

    return repr(observed.method) if isinstance(observed.case, NoCall) else f"{observed.case!r}.run({observed.method!r})"


def snippet(observed: Observation) -> list[str]:
    """Lines of Python that repeat the observed call."""
    from nmbench.testing.laws.base import NoCall

    if isinstance(observed.case, NoCall):
        return [*import_of(observed.method), f"print({observed.method!r})"]
    case = type(observed.case).__name__
    return [f"from nmbench.testing import {case}", *import_of(observed.method), f"print({call_text(observed)})"]


def import_of(method: Method) -> list[str]:
    cls = type(method)
    return [f"from {cls.__module__} import {cls.__qualname__.partition('.')[0]}"]
