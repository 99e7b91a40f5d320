"""Joining the specification of a run directory with the specification of a new command, or refusing to."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from nmbench.errors import RunMismatch
from nmbench.options import read
from nmbench.spec import MethodSpec, RunSpec


def merged(earlier: RunSpec, spec: RunSpec, where: Path, recorded: Collection[str]) -> RunSpec:
    """Return the union of two specs of one protocol; labels in `recorded` keep their options.

    Raises `RunMismatch` naming every difference that cannot be joined.
    """
    before = earlier.protocol()
    differences = list(differing(before, {**dict.fromkeys(before), **spec.protocol()}))
    if earlier.pattern_for != spec.pattern_for:
        differences.append(f"pattern_for was {dict(earlier.pattern_for)}, now {dict(spec.pattern_for)}")
    known = {method.label: method for method in earlier.methods}
    for method in spec.methods:
        other = known.setdefault(method.label, method)
        if method.label not in recorded:
            known[method.label] = method
        elif other.name != method.name or not same(other.options, method.options):
            differences.append(
                f"label {method.label!r} was {described(other)}, now {described(method)} (a label of its own, as "
                f"--method {method.label}2={method.name} --set {method.label}2.OPTION=VALUE, adds a row instead)"
            )
    if differences:
        raise RunMismatch(f"{where} holds another run: {'; '.join(differences)}. Give another --out.")
    return dataclasses.replace(
        spec,
        methods=tuple(known.values()),
        patterns=tuple(dict.fromkeys((*earlier.patterns, *spec.patterns))),
        seeds=tuple(dict.fromkeys((*earlier.seeds, *spec.seeds))),
        plugins=tuple(dict.fromkeys((*earlier.plugins, *spec.plugins))),
    )


def filled(spec: RunSpec, other: RunSpec) -> RunSpec:
    """Return `spec` with the settings of `other` that it leaves open."""
    given = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return dataclasses.replace(spec, **{name: getattr(other, name) for name, it in given.items() if it is None})


def described(method: MethodSpec) -> str:
    """Return the name and options of a method as words for a message."""
    listed = ", ".join(f"{name}={value}" for name, value in method.options.items())
    return f"{method.name} with {listed or 'default options'}"


def same(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return True if options are equal as values or as text: 500 and "500", true and "yes"."""
    return before.keys() == now.keys() and all(alike(before[name], now[name]) for name in now)


def alike(before: Any, now: Any) -> bool:
    """Return True if two values of an option are equal; either may be the text of a value."""
    if type(before) is type(now):
        return bool(before == now)
    kind = type(before) if isinstance(now, str) else type(now)
    try:
        return bool(read(before, kind) == read(now, kind))
    except ValueError:
        return False


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in now:
        if before.get(name) != now[name]:
            yield f"{name} was {before.get(name)!r}, now {now[name]!r}"
