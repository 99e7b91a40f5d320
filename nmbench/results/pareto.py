"""Quality against cost: which rows of a run are on a Pareto front.

Quality is the first metric of the run. There is one front for each kind of cost, because they are no substitutes for
each other:

    seconds  wall-clock time of pruning or learning, the device synchronised
    tokens   forward tokens + 2 x backward tokens: a backward pass costs two products where a forward pass costs one
    bytes    peak memory of the device; on a CPU there is none, because the memory of the process says little

A row is on a front if no other row of the same run and pattern is at least as good and at least as cheap, and better in
one of the two; seconds and bytes that differ by 5 % or less count as equal. Seeds of one label are averaged before they
are compared, and runs whose seeds are joined are one run. The dense model takes no part, because it has no cost, nor do
imported masks, whose cost is unknown.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

Record = Mapping[str, Any]
Key = TypeVar("Key", bound=Hashable)
COSTS = ("seconds", "tokens", "bytes")
TOLERANCES = {"seconds": 0.05, "tokens": 0.0, "bytes": 0.05}  # two runs of one job differ by so much


class Point(NamedTuple):
    """Lower is better in both."""

    loss: float
    cost: float


def cost_of(record: Record) -> dict[str, float]:
    """The cost of a row that ended well, by kind: seconds, tokens, and, on a GPU, bytes; empty where it is unknown."""
    tokens = record["cost"]["forward_tokens"]
    if tokens is None:
        return {}
    found = {
        "seconds": record["seconds"]["prune"],
        "tokens": tokens + 2 * (record["cost"].get("backward_tokens") or 0),
    }
    device_bytes = record["peak_bytes"]["device"]
    return found if device_bytes is None else {**found, "bytes": device_bytes}


def front(points: Mapping[Key, Point], tolerance: float = 0.0) -> set[Key]:
    """The keys of the points that no other point dominates; of equal points all.

    Costs that differ by no more than the share `tolerance` count as equal.
    """
    rivals = points.values()
    return {key for key, point in points.items() if not any(dominates(other, point, tolerance) for other in rivals)}


def front_of(points: Mapping[Key, tuple[float, float]], kind: str) -> set[Key]:
    """Return the keys of the rows on the front of one kind of cost; a row is its loss and its cost."""
    return front({key: Point(*point) for key, point in points.items()}, TOLERANCES[kind])


def dominates(a: Point, b: Point, tolerance: float = 0.0) -> bool:
    """True if `a` is as good and as cheap as `b`, and better or cheaper."""
    as_cheap, cheaper = a.cost <= b.cost * (1 + tolerance), a.cost < b.cost * (1 - tolerance)
    return a.loss <= b.loss and as_cheap and (a.loss < b.loss or cheaper)


def quality(records: Iterable[Record]) -> str | None:
    """The metric that rows are judged by: the first of the run."""
    return next((name for record in records for name in record["metrics"]), None)


def pareto(records: Sequence[Record]) -> dict[tuple[Any, ...], list[str]]:
    """For every row that ended well, by `row_key`, the kinds of cost on whose fronts it is."""
    groups: dict[tuple[Any, ...], dict[tuple[Any, ...], list[Record]]] = {}
    runs = linked(records)
    for record in records:
        if record["status"] == "ok" and record["pattern"] is not None:
            rival = (runs.get(record.get("directory")), record["pattern"])
            groups.setdefault(rival, {}).setdefault(row_key(record), []).append(record)
    found: dict[tuple[Any, ...], list[str]] = {}
    for rows in groups.values():
        name = quality(record for seeds in rows.values() for record in seeds)
        for kind in COSTS:
            on_front = front(points(rows, name, kind), TOLERANCES[kind]) if name else set()
            for key in rows:
                found.setdefault(key, []).extend([kind] if key in on_front else [])
    return found


def linked(records: Sequence[Record]) -> dict[Any, Any]:
    """Return for every run directory the first one of those that share joined rows with it."""
    runs = {record.get("directory"): record.get("directory") for record in records}
    for record in records:
        first, own = (runs[record.get(name, record.get("directory"))] for name in ("row_directory", "directory"))
        runs = {run: first if found == own else found for run, found in runs.items()}
    return runs


def points(rows: Mapping[tuple[Any, ...], Sequence[Record]], name: str, kind: str) -> dict[tuple[Any, ...], Point]:
    """Mean loss and mean cost over seeds of the rows that have the metric `name`."""
    found = {}
    for key, seeds in rows.items():
        measured = [record for record in seeds if name in record["metrics"] and kind in cost_of(record)]
        if measured:
            loss = fmean(loss_of(record["metrics"][name]) for record in measured)
            found[key] = Point(loss, fmean(cost_of(record)[kind] for record in measured))
    return found


def loss_of(metric: Mapping[str, Any]) -> float:
    """A metric's value, turned round if larger is better."""
    return metric["value"] if metric["lower_is_better"] else -metric["value"]


def row_key(record: Record) -> tuple[Any, ...]:
    """Return run directory, label and pattern, which all seeds of a row share."""
    return record.get("row_directory", record.get("directory")), record["label"], record["pattern"]
