"""The protocol line of every run, so that a table copied elsewhere can still be understood."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nmbench.plain_data import read_toml
from nmbench.results.format import Record
from nmbench.results.ranking import of_run, pattern_of
from nmbench.results.records import Rows
from nmbench.results.sampled_note import sampled_protocol


def protocol_lines(results: Rows) -> list[str]:
    """Return model, patterns, metrics, calibration, seeds, device and versions of every run directory with rows.

    If the rows of one run differ in a version or a device, the line names all of them.
    """
    several = len(results.directories) > 1
    found = ((directory, of_run(results, directory)) for directory in results.directories)
    return [
        f"{directory}: {line(records, directory)}" if several else line(records, directory)
        for directory, records in found
        if records
    ]


def line(records: Sequence[Record], directory: Path) -> str:
    """Return the protocol line of one run."""
    parts = {
        "protocol": joined(record["protocol_digest"] for record in records),
        "model": joined(record["model"] for record in records),
        "patterns": joined(pattern_of(record) for record in records if record["pattern"]),
        "metrics": joined(name for record in records for name in record["metrics"]),
        "calibration": joined(record["calibration"] for record in records if record["calibration"]),
        "sliding window": joined(f"{window} tokens" for record in records if (window := record.get("sliding_window"))),
        "seeds": joined(record["seed"] for record in records if record["seed"] is not None),
    }
    stated = [f"{name} {text}" for name, text in parts.items() if text]
    about = (*sampled_protocol(records), *composition(records), *sizes(directory))
    return "; ".join([*stated, *about, environment(records)]) + "."


def composition(records: Sequence[Record]) -> Iterator[str]:
    """The kinds of layers that are pruned, by their shares of the pruned weights."""
    coverage = next((record["coverage"] for record in records if record["coverage"]), None)
    if coverage and (kinds := coverage.get("kinds")):
        shares = (f"{kind} {count / coverage['weights']:.1%}" for kind, count in kinds.items())
        yield f"pruned: {', '.join(shares)}"


def sizes(directory: Path) -> Iterator[str]:
    """Yield the sizes of the calibration text, the skipped layers, and how weights are stored if not in the dtype.

    They are read from the `spec.toml` of a run, if it exists.
    """
    path = directory / "spec.toml"
    spec = read_toml(path) if path.is_file() else {}
    if "windows" in spec and "window_tokens" in spec:
        yield f"statistics from {spec['windows']} windows of {spec['window_tokens']} tokens"
    if "pool_tokens" in spec and "selection_tokens" in spec:
        yield f"mask learners: {spec['pool_tokens']} tokens and {spec['selection_tokens']} to choose by"
    if "skip" in spec:
        yield f"left dense: {joined(spec['skip'])}"
    if "weights" in spec:
        yield f"prunable weights stored as {spec['weights']}"


def environment(records: Sequence[Record]) -> str:
    """Return versions, device and dtypes of the rows."""
    names = dict.fromkeys(name for record in records for name in record["environment"])
    return ", ".join(f"{name} {' or '.join(values_of(records, name))}" for name in names)


def values_of(records: Sequence[Record], name: str) -> list[str]:
    """Return the distinct values of one item in the environments of the rows."""
    found = (record["environment"][name] for record in records if name in record["environment"])
    return list(dict.fromkeys(map(str, found)))


def joined(values: Iterable[Any]) -> str:
    """Return the distinct values in their order, separated by commas."""
    return ", ".join(dict.fromkeys(map(str, values)))
