"""The address of a row on the command line: `RUN_DIRECTORY:LABEL`, `:LABEL:2:4`, `:LABEL:2:4:0` with the seed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORM = "RUN_DIRECTORY:LABEL[:N:M[:SEED]]"
COLONS = re.compile(r"(?P<label>[^:]+)(?::(?P<pattern>[0-9]+:[0-9]+(?:x[0-9]+)?))?(?::(?P<seed>[0-9]+))?")
FILE = re.compile(
    r"(?P<label>[^:]+)--(?P<n>[0-9]+)-(?P<m>[0-9]+(?:x[0-9]+)?)--seed(?P<seed>[0-9]+)"
)  # of masks and losses


def file_name(label: str, pattern: object, seed: object) -> str:
    """Return the name of the files of a row, without a suffix: `maskpro--2-4--seed0`."""
    return f"{label}--{str(pattern).replace(':', '-')}--seed{seed}"


@dataclass(frozen=True)
class Address:
    """Rows of one run directory: those of a label, pattern and seed, where they are given."""

    directory: Path
    label: str | None = None
    pattern: str | None = None
    seed: int | None = None

    def names(self, label: str, pattern: str | None, seed: int | None) -> bool:
        """Return True if the address names a row."""
        given = ((self.label, label), (self.pattern, pattern), (self.seed, seed))
        return all(wanted is None or wanted == found for wanted, found in given)

    @property
    def choice(self) -> tuple[Sequence[str], Sequence[str], Sequence[int]]:
        """The patterns, labels and seeds that the address names, as `Results.only` takes them; empty ones name all."""
        seeds = () if self.seed is None else (self.seed,)
        return tuple(filter(None, (self.pattern,))), tuple(filter(None, (self.label,))), seeds


def address_of(text: str) -> Address | None:
    """Return the address of rows in a run directory; None for a text that names no run directory with a row.

    The name of the files of a row is taken as well: `RUN_DIRECTORY:wanda--2-4--seed0`.
    """
    for colon in (match.start() for match in re.finditer(":", text)):
        folder, row = Path(text[:colon]), text[colon + 1 :]
        if (folder / "records.jsonl").is_file() and (found := parts_of(row)):
            return Address(folder, **found)
    return None


def parts_of(row: str) -> Mapping[str, Any] | None:
    """Return label, pattern and seed of the text of a row, None where it has none; None for another text."""
    if match := FILE.fullmatch(row):
        return {"label": match["label"], "pattern": f"{match['n']}:{match['m']}", "seed": int(match["seed"])}
    if match := COLONS.fullmatch(row):
        seed = None if match["seed"] is None else int(match["seed"])
        return {"label": match["label"], "pattern": match["pattern"], "seed": seed}
    return None


def address_or_directory(path: Path) -> Address:
    """Return the address that an argument of the command line names: rows, or a whole run directory."""
    found = None if path.exists() else address_of(str(path))
    return found or Address(path)


def shown(label: str, pattern: str | None, seed: int | None) -> str:
    """Return the address of a row within its directory: `wanda:2:4:0`."""
    return ":".join(str(part) for part in (label, pattern, seed) if part is not None)
