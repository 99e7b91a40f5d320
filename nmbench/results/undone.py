"""The jobs that a run directory was asked for and does not hold yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmbench.plain_data import read_toml
from nmbench.results.directory import RunDirectory
from nmbench.results.format import Record


@dataclass(frozen=True)
class Progress:
    """The jobs of one run directory: `asked` for by its `spec.toml`, `done`, and `failed` among those not done."""

    directory: Path
    asked: int
    done: int
    failed: int

    def __str__(self) -> str:
        failed = f", {self.failed} of them failed" if self.failed else ""
        return f"{self.directory}: {self.asked - self.done} of {self.asked} jobs not done{failed}"


def undone_lines(directories: Sequence[Path]) -> list[str]:
    """Return a line for every run directory with jobs that are not done: `runs/a: 2 of 5 jobs not done`."""
    found = (progress_of(directory) for directory in directories)
    return [f"{one}; the command in its spec.toml goes on." for one in found if one.done < one.asked]


def progress_of(directory: Path) -> Progress:
    """Return how many jobs of a run directory are done; nothing is asked for without a `spec.toml`.

    The rows that learners and repairs begin with, and the dense row, are no jobs of their own.
    """
    spec = spec_of(directory)
    records = RunDirectory(directory).records()
    counts = list(counted(spec, records))
    asked, done, failed = (sum(count[column] for count in counts) for column in range(3))
    return Progress(directory, asked, done, failed)


def spec_of(directory: Path) -> dict[str, Any]:
    """Return the content of the `spec.toml` of a run directory; nothing without that file."""
    path = directory / "spec.toml"
    return read_toml(path) if path.is_file() else {}


def asked_methods(directory: Path) -> Mapping[str, Mapping[str, Any]]:
    """Return the methods that a run directory was asked for: label -> `method` and `options` as the user gave them."""
    return {
        label: {"method": content.get("method", label), "options": content.get("options", {})}
        for label, content in spec_of(directory).get("methods", {}).items()
    }


def counted(spec: dict[str, Any], records: Sequence[Record]) -> Iterator[tuple[int, int, int]]:
    """Yield for every method, pattern and seed of a specification the jobs asked for, done and failed."""
    for label, method in spec.get("methods", {}).items():
        for pattern in spec.get("patterns", ()):
            for seed in spec.get("seeds", ()):
                own = [record for record in records if (record["pattern"], record["seed"]) == (pattern, seed)]
                states = [record["status"] for record in own if label in (record["label"], record.get("repairs"))]
                asked = max(starts_of(method), len(states))
                yield asked, states.count("ok"), len(states) - states.count("ok")


def starts_of(method: dict[str, Any]) -> int:
    """Return the number of rows that a method has at least: one for every start of a repair."""
    names = str(method.get("options", {}).get("init", "")).split(",")
    return max(1, sum(bool(name.strip()) for name in names))
