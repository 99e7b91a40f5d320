"""From a published table to the specification of an ordinary run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nmbench.cli.published.masks import mask_path
from nmbench.cli.published.table import Line, Table, labels
from nmbench.errors import NMBenchError, unknown
from nmbench.spec import DENSE, RunSpec


def only(table: Table, chosen: Sequence[str]) -> Table:
    """Return the table with the lines of some labels, and those of the dense model. An empty choice takes all lines.

    Raises `NMBenchError` for an unknown label, and if no pruned row is left.
    """
    for label in chosen:
        if label not in labels(table.lines):
            raise unknown("label", label, labels(table.lines), f" in --only, of table {table.name}")
    lines = tuple(line for line in table.lines if not chosen or line.label in (*chosen, DENSE))
    if all(line.method is None for line in lines):
        raise NMBenchError(f"--only {DENSE} leaves no pruned row of table {table.name}; name one of them too.")
    return dataclasses.replace(table, lines=lines)


def spec_of(table: Table, settings: Mapping[str, Any], masks: Path | None = None) -> RunSpec:
    """Return the run that measures every line of a table.

    `settings` are those of `RunSpec` that the user gives, such as a model in place of the published one. `masks` is a
    local copy of the published mask file. Raises `NMBenchError` for settings that are none, and for masks that cannot
    be had or are given to a table without any.
    """
    if masks and not any(line.masks for line in table.lines):
        raise NMBenchError(f"table {table.name} has no line with published masks; leave out --masks.")
    rows = {line.label: line for line in table.lines if line.method}
    content = {
        **table.run,
        "model": table.model,
        "patterns": [table.pattern],
        "methods": {label: method_of(line, masks) for label, line in rows.items()},
        "metrics": list(dict.fromkeys(line.metric.partition(" ")[0] for line in table.lines)),
        **settings,
    }
    return RunSpec.from_dict(content, f"table {table.name}")


def method_of(line: Line, masks: Path | None) -> dict[str, Any]:
    """Return the method of a row as plain data, with the path of its masks."""
    path = {"path": str(mask_path(line.masks, masks))} if line.masks else {}
    return {"method": line.method, "options": {**line.options, **path}}
