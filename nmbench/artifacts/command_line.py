"""The command line of a run specification."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from nmbench.spec import RunSpec

REPEATED = {"patterns": "--pattern", "seeds": "--seed", "skip": "--skip", "metrics": "--metric", "plugins": "--plugin"}
NEGATED = {"stream": ["--no-stream"]}  # False is the default of all other flags
TABLES = ("methods", "pattern_for")


def command_of(spec: RunSpec) -> str:
    """The `nmbench run` command that gives `spec` again, quoted for a shell."""
    return shlex.join(["nmbench", "run", *arguments(spec)])


def arguments(spec: RunSpec) -> Iterator[str]:
    """The flags of a specification, methods first; fields without a value have no flag."""
    for method in spec.methods:
        yield from ("--method", method.name if method.name == method.label else f"{method.label}={method.name}")
        for name, value in method.options.items():
            yield from ("--set", f"{method.label}.{name}={text(value)}")
    for layers, pattern in spec.pattern_for:
        yield from ("--pattern-for", f"{layers}={pattern}")
    for name, value in spec.to_dict().items():
        flag = f"--{name.replace('_', '-')}"
        if name in REPEATED:
            for item in value:
                yield from (REPEATED[name], str(item))
        elif isinstance(value, bool):
            yield from [flag] if value else NEGATED.get(name, [])
        elif name not in TABLES:
            yield from (flag, str(value))


def text(value: Any) -> str:
    """The value of an option in the form that `--set` accepts."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
