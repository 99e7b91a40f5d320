"""Rows of several run directories that are one row: the same work at other seeds.

A label at a pattern is one row, whichever directories its seeds are in, if protocol, method, options, patterns and the
row that it begins with are equal. Its records then share `row_directory`, the first of these directories. A seed that
two directories hold with the same figures counts once; with other figures the row is not joined.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from nmbench.results.format import Record

DECIDES = ("protocol_digest", "label", "pattern", "pattern_for", "method", "options", "content", "repairs")
Seeds = Mapping[str, Mapping[int | None, Record]]  # run directory -> seed -> record


def joined(records: Sequence[Record]) -> list[Record]:
    """Return records of several directories with `row_directory` where their rows are joined, repeated ones left out.

    `records`: each with its `directory`; the newest of each row.
    """
    rows = rows_over_directories(records)
    first = {id(one): next(iter(row)) for row in rows for seeds in row.values() for one in seeds.values()}
    repeated = {id(one) for row in rows for one in repetitions(row)}
    return [
        cast(Record, {**record, "row_directory": first[id(record)]}) if id(record) in first else record
        for record in records
        if id(record) not in repeated
    ]


def rows_over_directories(records: Sequence[Record]) -> list[Seeds]:
    """Return the rows that can be joined: those in several directories whose figures agree wherever they repeat."""
    return [row for row in same_work(records) if len(row) > 1 and not list(conflicts(row))]


def same_work(records: Sequence[Record]) -> list[Seeds]:
    """Return every row that ended well, by directory and seed."""
    known = {(record.get("directory"), *seat(record)): record for record in records}
    found: dict[str, dict[str, dict[int | None, Record]]] = {}
    for record in records:
        if record["status"] == "ok" and "directory" in record and record.get("protocol_digest"):
            key = json.dumps(list(work_of(record, known)), sort_keys=True)
            found.setdefault(key, {}).setdefault(record["directory"], {})[record["seed"]] = record
    return list(found.values())


def seat(record: Record) -> tuple[Any, ...]:
    """Return label, pattern and seed."""
    return record["label"], record["pattern"], record["seed"]


def work_of(record: Record, known: Mapping[tuple[Any, ...], Record]) -> Iterator[Any]:
    """Yield everything that decides a row but its seed, and the same of the row that it begins with."""
    yield [record.get(name) for name in DECIDES]
    start = known.get((record.get("directory"), record["started_from"], record["pattern"], record["seed"]))
    if start is not None and start is not record:
        yield from work_of(start, known)


def conflicts(row: Seeds) -> Iterator[tuple[str, str, int | None]]:
    """Yield two directories and a seed that both hold with other figures."""
    for one, other in itertools.combinations(row, 2):
        for seed in row[one].keys() & row[other].keys():
            if figures(row[one][seed]) != figures(row[other][seed]):
                yield one, other, seed


def repetitions(row: Seeds) -> Iterator[Record]:
    """Yield the records whose seed an earlier directory holds."""
    seen: set[int | None] = set()
    for seeds in row.values():
        yield from (record for seed, record in seeds.items() if seed in seen)
        seen |= seeds.keys()


def figures(record: Record) -> Any:
    """Return what is equal in two records of the same result: metrics, differences to dense, measured weights."""
    return record["metrics"], record.get("against_dense"), record.get("measured_digest")


def apart_notes(records: Sequence[Record]) -> list[str]:
    """Return a line for every row that is shown apart because two directories have other figures for a seed."""
    lines = []
    for row in same_work(records):
        for one, other, seed in itertools.islice(conflicts(row), 1):
            about = row[one][seed]
            name = " ".join(str(part) for part in seat(about)[:2] if part is not None)
            where = "the dense row" if about["pattern"] is None else f"seed {seed}"
            lines.append(f"NOTE {name}: {one} and {other} hold other figures for {where}: its seeds are not joined.")
    return lines
