"""Several runs in one TOML file: `models`, and tables `[[grid]]` that each change some settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmbench.errors import NMBenchError

if TYPE_CHECKING:
    from nmbench.spec import RunSpec

GRID, MODELS = "grid", "models"
Content = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One run of a file. `folder` of its run directory below `--out`; None for a file of one run."""

    spec: RunSpec
    folder: str | None

    def out(self, out: Path | None) -> Path | None:
        """Return the run directory; None: named by its protocol."""
        return out / self.folder if out and self.folder else out


def cells(content: Content, given: Content, where: str) -> list[tuple[dict[str, Any], str | None]]:
    """Return the runs of a file in order as plain data, each model of each `[[grid]]` table, with their folders.

    `given` are flags, which go before all.

    A key of a table takes the place of the same key above the tables. Raises `NMBenchError` for a malformed grid.
    """
    tables = content.get(GRID, [{}])
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise NMBenchError(f"{GRID} in {where} must be tables; begin each with [[{GRID}]].")
    shared = {name: value for name, value in content.items() if name != GRID}
    found = [{**cell, **given} for table in tables for cell in of_models({**shared, **table}, table, given, where)]
    if GRID not in content and MODELS not in content:
        return [(found[0], None)]
    return [(cell, folder_of(model_of(cell), found)) for cell in found]


def model_of(cell: Content) -> str:
    """Return the model of a run as plain data."""
    from nmbench.spec import MODEL

    return str(cell.get("model", MODEL))


def of_models(cell: Content, table: Content, given: Content, where: str) -> list[dict[str, Any]]:
    """Return one run for every one of the `models` of a table, or of the file if the table names no model."""
    plain = {name: value for name, value in cell.items() if name != MODELS}
    if MODELS not in cell or "model" in given or ("model" in table and MODELS not in table):
        return [plain]
    models = cell[MODELS]
    if not isinstance(models, list) or not models or not all(isinstance(model, str) for model in models):
        raise NMBenchError(f"{MODELS} in {where} must be a list of str, not {models!r}.")
    if "model" in plain:
        raise NMBenchError(f"{where} names both model and {MODELS}; leave one of them out.")
    return [{**plain, "model": model} for model in models]


def folder_of(model: str, found: Sequence[Content]) -> str:
    """Return the name of a folder for a model, which no other model of the grid has."""
    from nmbench.plain_data import digest

    others = set(map(model_of, found)) - {model}
    return f"{plain(model)}-{digest(model)}" if plain(model) in map(plain, others) else plain(model)


def plain(model: str) -> str:
    """Return a model reference as the name of a folder: letters, digits, dots, and dashes for all else."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", model).strip("-.") or "model"


def check_protocols(runs: Sequence[Run]) -> None:
    """Raise `NMBenchError` if two runs of one folder could not share its run directory, before either begins."""
    first: dict[str | None, RunSpec] = {}
    for run in runs:
        earlier = first.setdefault(run.folder, run.spec)
        if (earlier.protocol(), earlier.pattern_for) != (run.spec.protocol(), run.spec.pattern_for):
            raise NMBenchError(
                f"two tables of the grid measure {run.spec.model} by different protocols, which one run directory "
                f"cannot hold; leave --out out, so that each protocol has a directory of its own, or split the file."
            )


def each(runs: Sequence[Run], do: Callable[[Run], bool], fail_fast: bool, say: Callable[[str], None]) -> bool:
    """Do every run; return True if all ended well. An error ends its own run only, unless `fail_fast`."""
    well = True
    for run in runs:
        try:
            well &= do(run)
        except NMBenchError as error:
            if len(runs) == 1:
                raise
            say(f"Error: {run.spec.model}: {error}")
            well = False
        if fail_fast and not well:
            break
    return well
