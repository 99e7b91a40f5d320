"""The published tables that nmbench brings along, by name, and tables in files of the user's own."""

from __future__ import annotations

from pathlib import Path

from nmbench.cli.published.table import Table, read_table
from nmbench.errors import unknown

FOLDER = Path(__file__).parent / "tables"


def tables() -> list[Table]:
    """Return all tables of nmbench, sorted by name."""
    return [read_table(path) for path in sorted(FOLDER.glob("*.toml"), key=lambda path: path.stem)]


def table_named(name: str) -> Table:
    """Return a table of nmbench by its name, or the one in a TOML file. Raises `NMBenchError` for an unknown name."""
    if name.endswith(".toml"):
        return read_table(Path(name))
    known = {path.stem: path for path in FOLDER.glob("*.toml")}
    if name not in known:
        raise unknown("published table", name, known)
    return read_table(known[name])
