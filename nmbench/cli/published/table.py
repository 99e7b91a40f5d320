"""A published table: the figures of one model and pattern, each with its source and the tolerance of a repetition."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nmbench.errors import NMBenchError
from nmbench.plain_data import check_form, read_toml
from nmbench.spec import DENSE, METHOD

TABLE = {
    **{"title": str, "model": str, "pattern": str, "source": str},
    **{"run": Mapping[str, Any], "line": tuple[Mapping[str, Any], ...]},
}
LINE = {
    **{"label": str, "metric": str, "value": float | int, "tolerance": float | int, "because": str},
    **{"source": str, "differs": str, "masks": Mapping[str, str], **METHOD},
}
MASKS = {"repository": str, "file": str}
NEEDED = {  # keys without which an entry says too little
    "table": ("title", "model", "pattern", "source", "line"),
    "line": ("label", "metric", "value", "tolerance", "because"),
    "masks": ("repository", "file"),
}
OWN = ("model", "methods", "metrics", "patterns", "pattern_for", "seeds", "plugins")  # a table decides these itself


@dataclass(frozen=True)
class MaskFile:
    """A published mask file: a repository of the Hugging Face hub and a file in it."""

    repository: str
    file: str

    def __str__(self) -> str:
        return f"{self.file} of hf:{self.repository}"


@dataclass(frozen=True)
class Line:
    """One published figure.

    `value` is in the unit of `metric`. `tolerance` is the share of `value` by which a repetition may differ, `because`
    the reason for it, `differs` the known differences between the published run and ours. `method` is None for the
    dense model. `masks`: the row is imported from a published file.
    """

    label: str
    metric: str
    value: float
    tolerance: float
    because: str
    source: str
    differs: str = ""
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    masks: MaskFile | None = None


@dataclass(frozen=True)
class Table:
    """The published figures of one model at one pattern, and the settings of the run that makes them again."""

    name: str
    title: str
    model: str
    pattern: str
    source: str
    lines: Sequence[Line]
    run: Mapping[str, Any] = field(default_factory=dict)


def read_table(path: Path) -> Table:
    """Return the table in a TOML file. Raises `NMBenchError` for a missing file, bad TOML or an entry that is no table.

    A table has at least one pruned row, and the rows of one label are of one method.
    """
    content = read_toml(path)
    where = str(path)
    check_entry(content, TABLE, "table", where)
    check_form(
        content.get("run", {}), {name: Any for name in content.get("run", {}) if name not in OWN}, f"run of {where}"
    )
    lines = tuple(
        line_of(entry, content["source"], f"line {n} of {where}") for n, entry in enumerate(content["line"], 1)
    )
    refuse_contradictions(lines, where)
    fields = {name: content[name] for name in ("title", "model", "pattern", "source")}
    return Table(path.stem, lines=lines, run=content.get("run", {}), **fields)


def check_entry(entry: Any, form: Mapping[str, Any], kind: str, where: str) -> None:
    """Raise `NMBenchError` unless an entry has the keys that its kind needs, and only keys and types of `form`."""
    check_form(entry, form, where)
    if missing := [name for name in NEEDED[kind] if name not in entry]:
        raise NMBenchError(f"{where} has no {', no '.join(missing)}; a {kind} needs {', '.join(NEEDED[kind])}.")


def line_of(entry: Any, source: str, where: str) -> Line:
    """Return the line of an entry; without a `source` of its own it has that of the table."""
    check_entry(entry, LINE, "line", where)
    for name in ("value", "tolerance"):
        if not 0 < entry[name] < math.inf:
            raise NMBenchError(f"{name} in {where} must be a positive number, not {entry[name]}.")
    entry = {"source": source, **entry}
    if masks := entry.get("masks"):
        check_entry(masks, MASKS, "masks", f"masks in {where}")
        entry = {**entry, "method": "import", "masks": MaskFile(**masks)}
    if entry["label"] == DENSE and entry.get("method"):
        raise NMBenchError(f"{where} gives the dense model a method; the label {DENSE!r} has none.")
    if entry["label"] != DENSE:
        entry = {"method": entry["label"], **entry}
    return Line(**{**entry, "value": float(entry["value"]), "tolerance": float(entry["tolerance"])})


def refuse_contradictions(lines: Sequence[Line], where: str) -> None:
    """Raise `NMBenchError` for a figure given twice, one label of two methods, or a table without a pruned row."""
    first: dict[str, Line] = {}
    for i, line in enumerate(lines):
        known = first.setdefault(line.label, line)
        if any(line.metric == other.metric and known.label == other.label for other in lines[:i]):
            raise NMBenchError(f"{where} gives {line.metric} of {line.label!r} twice.")
        if (known.method, known.options, known.masks) != (line.method, line.options, line.masks):
            raise NMBenchError(f"{where} gives the label {line.label!r} to two methods; name them apart.")
    if all(line.method is None for line in lines):
        raise NMBenchError(f"{where} has no pruned row; the dense model alone is no comparison.")


def labels(lines: Sequence[Line]) -> Iterator[str]:
    """Yield the labels of lines, each once, in their order."""
    yield from dict.fromkeys(line.label for line in lines)
