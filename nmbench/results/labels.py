"""What the label of a row stands for: method, start, options, and the command that makes its rows again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmbench.results.format import Record
from nmbench.results.ranking import of_rows
from nmbench.results.records import Rows
from nmbench.results.undone import asked_methods


@dataclass(frozen=True)
class Meaning:
    """What one label of a run directory stands for.

    `options`: as they were resolved; `given`: those that the user set. `command` makes the rows of the label again.
    """

    label: str
    method: str
    started_from: str | None
    options: Mapping[str, Any]
    given: Mapping[str, Any]
    run: Path
    command: str

    def __str__(self) -> str:
        """`short = maskpro, steps=500`; for a start what it belongs to."""
        options = "".join(f", {name}={shown(value)}" for name, value in self.given.items())
        start = f", begins with {self.started_from}" if self.started_from else ""
        return f"{self.label} = {self.method}{options}{start}"

    @property
    def plain(self) -> bool:
        """True if the label is the name of the method, with the default options."""
        return self.label == self.method and not self.given

    @property
    def all_options(self) -> str:
        """Every option with its value, `none` if the method has none."""
        return ", ".join(f"{name}={shown(value)}" for name, value in self.options.items()) or "none"


def meanings(results: Rows) -> list[Meaning]:
    """Return what every label of every run directory stands for, in the order of the records; not the dense row.

    A label whose seeds are joined is one, with all its seeds.
    """
    found = []
    for run in results.directories:
        records = [record for record in of_rows(results, run) if record["method"]]
        for label in dict.fromkeys(record["label"] for record in records):
            own = [record for record in records if record["label"] == label]
            found.append(meaning(own, run))
    return found


def meaning(records: Sequence[Record], run: Path) -> Meaning:
    """Return what the label of `records` stands for."""
    first = records[0]
    asked = asked_methods(run)
    given = asked.get(name_in_spec(first), {}).get("options", {}) if is_method(first, asked) else {}
    patterns = list(dict.fromkeys(str(record["pattern"]) for record in records))
    seeds = list(dict.fromkeys(record["seed"] for record in records if record["seed"] is not None))
    about = first["label"], str(first["method"]), first["started_from"]
    return Meaning(*about, first["options"], given, run, repeat_command(first, run, patterns, seeds))


def is_method(record: Record, asked: Mapping[str, Any]) -> bool:
    """Return True if a row is of a method that the user asked for, and no start of another row."""
    return asked.get(name_in_spec(record), {}).get("method") == record["method"]


def name_in_spec(record: Record) -> str:
    """Return the label of the method in `spec.toml` that a row belongs to."""
    return str(record.get("repairs") or record["label"].removesuffix("@init"))


def run_command(run: str | Path) -> str:
    """Return the command that repeats, or resumes, a whole run."""
    return f"nmbench run --config {shlex.quote(f'{run}/spec.toml')} --out {shlex.quote(str(run))}"


def repeat_command(record: Record, run: str | Path, patterns: Sequence[str], seeds: Sequence[int]) -> str:
    """Return the command that repeats a row in a new folder, with the rows that it begins with."""
    parts = ["nmbench", "run", "--config", f"{run}/spec.toml"]
    for label, method, options in needed(record, Path(run)):
        parts += ["--method", method if label == method else f"{label}={method}"]
        parts += [word for name, value in options.items() for word in ("--set", f"{label}.{name}={shown(value)}")]
    parts += [word for pattern in patterns for word in ("--pattern", pattern)]
    parts += [word for seed in seeds for word in ("--seed", str(seed))]
    return shlex.join([*parts, "--out", "again"])


def shown(value: Any) -> str:
    """Return the value of an option as the command line takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def needed(record: Record, run: Path) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield label, method and options of a row and of the labels that it begins with, as `spec.toml` has them."""
    methods = asked_methods(run)
    label = name_in_spec(record)
    wanted, seen = [label], set()
    while wanted:
        name = wanted.pop(0)
        if name in seen:
            continue
        seen.add(name)
        if name not in methods:
            if name == label:  # a start under its own name, or a folder without spec.toml
                set_ones = {option: value for option, value in record["options"].items() if value is not None}
                yield name, str(record["method"]), {} if methods else set_ones
            continue
        options = methods[name]["options"]
        yield name, methods[name]["method"], options
        wanted += [one.strip().partition("@")[0] for one in str(options.get("init", "")).split(",") if one.strip()]
