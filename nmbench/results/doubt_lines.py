"""The doubts of a run below its table: each reason to distrust a figure once, with the rows that it concerns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nmbench.results.format import Record
from nmbench.spec import DENSE


def doubt_lines(records: Sequence[Record]) -> list[str]:
    """Return one line for each doubt; of a doubt that the dense row does not share, with the rows that have it."""
    several = len({record.get("directory") for record in records}) > 1
    rows: dict[tuple[str | None, str], list[str]] = {}
    for record in records:
        for doubt in record.get("doubts", ()):
            rows.setdefault((record.get("directory"), doubt), []).append(named(record))
    return [
        f"DOUBT {f'{directory}: ' if several else ''}{'' if DENSE in names else f'{listed(names)}: '}{doubt}"
        for (directory, doubt), names in rows.items()
    ]


def named(record: Record) -> str:
    """Return the name of a row: `wanda 2:4 seed 0`."""
    if record["label"] == DENSE:
        return DENSE
    return f"{record['label']} {record['pattern']} seed {record['seed']}"


def listed(names: Iterable[str]) -> str:
    """Return names with commas."""
    return ", ".join(dict.fromkeys(names))


def unranked_texts(records: Sequence[Record]) -> list[str]:
    """Return the texts (`demo@256`) that the dense model does not predict, so that rows are not ranked by them."""
    return [name for record in records for name in record.get("unranked", ())]


def is_unranked(metric: str, texts: Sequence[str]) -> bool:
    """Return True if a metric, or the losses of a text under their name, is of one of `texts`."""
    return metric in texts or metric.partition(":")[2] in texts
