"""What two runs were asked for, or were done with, differently: a line for each, said once for all rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nmbench.results.format import Record
from nmbench.results.protocol_line import values_of
from nmbench.results.two_runs.sides import Side

CONTENT = ("model_digest", "test_digests", "metric_provenance")  # of the manifest, part of the protocol
SHORT = 16  # characters of a digest
OF_ROW = ("method", "started_from", "repairs")


def protocol_changes(a: Side, b: Side) -> list[str]:
    """Return the settings and contents by which the protocols differ; nothing if the protocol is one.

    Where neither settings nor contents say in what, as without `spec.toml`, the two digests are named.
    """
    if a.protocol == b.protocol:
        return []
    found = list(differing(a.settings, b.settings)) if a.settings and b.settings else []
    for name in CONTENT:
        found += differing(flat(name, a.about.get(name)), flat(name, b.about.get(name)))
    return found or [f"protocol {a.protocol} -> {b.protocol}"]


def flat(name: str, content: Any) -> dict[str, Any]:
    """Return an entry of the manifest as names and values: `test_digests demo`."""
    if isinstance(content, Mapping):
        return {f"{name} {key}": value for key, value in content.items()}
    return {} if content is None else {name: content}


def changed_settings(a: Side, b: Side) -> list[str]:
    """Return what changed beside the protocol: environment, options of methods, calibration tokens; each once."""
    return list(dict.fromkeys([*environments(a, b), *rows(a, b)]))


def environments(a: Side, b: Side) -> Iterator[str]:
    """Yield versions, devices and threads that changed; a run that was done on two machines names both."""
    sides = [one.results.records for one in (a, b)]
    names = dict.fromkeys(name for records in sides for record in records for name in record["environment"])
    for name in names:
        first, second = (" or ".join(values_of(records, name)) or "-" for records in sides)
        if first != second:
            yield f"{name} {first} -> {second}"


def rows(a: Side, b: Side) -> Iterator[str]:
    """Yield what changed in the rows of both runs: `maskpro.steps 500 -> 1000`."""
    for key in a.rows:
        ours, theirs = a.records_of(key), b.records_of(key)
        for seed in (seed for seed in ours if seed in theirs and key[1]):
            yield from row(ours[seed], theirs[seed])


def row(a: Record, b: Record) -> Iterator[str]:
    """Yield what changed in one row: method, options, code of its plugin, layers of another pattern, tokens."""
    label, seed = a["label"], a["seed"]
    yield from differing({f"{label} {n}": a.get(n) for n in OF_ROW}, {f"{label} {n}": b.get(n) for n in OF_ROW})
    yield from differing(flat_options(label, a["options"]), flat_options(label, b["options"]))
    yield from differing(flat_options(label, a["content"]), flat_options(label, b["content"]))
    yield from differing({"pattern_for": a["pattern_for"]}, {"pattern_for": b["pattern_for"]})
    tokens = {"calibration tokens": "calibration_digest", "tokens of learners": "pool_digest"}
    first, second = ({f"{words} of seed {seed}": r.get(name) for words, name in tokens.items()} for r in (a, b))
    yield from differing(first, second)


def flat_options(label: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options under their names on the command line: `maskpro.steps`."""
    return {f"{label}.{name}": value for name, value in options.items()}


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    """Yield `name a -> b` for every value that differs; `-` stands for a missing one."""
    for name in dict.fromkeys((*a, *b)):
        if a.get(name) != b.get(name):
            yield f"{name} {shown(a.get(name))} -> {shown(b.get(name))}"


def shown(value: Any) -> str:
    """Return a value as text; long digests are cut."""
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "-"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text[:SHORT] if len(text) == 64 and not text.strip("0123456789abcdef") else text
