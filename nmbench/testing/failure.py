"""How a failed check speaks: the law, the call, what came out, what should have, and code to see it by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nmbench.methods import Method
    from nmbench.testing.laws.base import Broken, Law
    from nmbench.testing.watch import Seen


class CheckFailed(AssertionError):
    """A method breaks a law of the kit."""


def failure_text(law: Law, seen: Seen, broken: Broken) -> str:
    """The whole message; its last lines are Python that makes the call again."""
    lines = [
        f"{type(seen.method).__name__} breaks {law.name}: {law.sentence}",
        f"  call:     {broken.call or call_text(seen)}",
        f"  got:      {broken.got}",
        f"  expected: {broken.expected}",
        "  see it with:",
        *(f"    {line}" for line in snippet(seen)),
    ]
    return "\n".join(lines)


def call_text(seen: Seen) -> str:
    from nmbench.testing.laws.base import NoCall

    return repr(seen.method) if isinstance(seen.case, NoCall) else f"{seen.case!r}.run({seen.method!r})"


def snippet(seen: Seen) -> list[str]:
    """Python that repeats the call of a case."""
    from nmbench.testing.laws.base import NoCall

    if isinstance(seen.case, NoCall):
        return [*import_of(seen.method), f"print({seen.method!r})"]
    case = type(seen.case).__name__
    return [f"from nmbench.testing import {case}", *import_of(seen.method), f"print({call_text(seen)})"]


def import_of(method: Method) -> list[str]:
    cls = type(method)
    return [f"from {cls.__module__} import {cls.__qualname__.partition('.')[0]}"]
