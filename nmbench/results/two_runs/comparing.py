"""The comparison of two runs: the rows of both, by how much each metric changed, and whether that is more than noise.

Rows are the same if label, pattern and seed are. Several seeds are averaged, those that both runs have. A change is
judged by the paired bootstrap of `nmbench.comparison` over the windows of the test text, which needs that both runs
kept the losses of the row and have one protocol.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from nmbench.comparison import Difference, paired
from nmbench.results.format import Record
from nmbench.results.mask_overlap import differing_bits
from nmbench.results.pareto import COSTS, cost_of
from nmbench.results.ranking import Row, file_name
from nmbench.results.results import Results
from nmbench.results.two_runs.settings import changed_settings, protocol_changes
from nmbench.results.two_runs.sides import Key, Side, comparable_metrics, named, refuse_unlike, side
from nmbench.sources import ValueRecord
from nmbench.spec import PERPLEXITY

ROUNDING = 5e-5  # the largest change that four decimals print as zero
BETTER, WORSE, MIXED, WITHIN, SAME, UNKNOWN = (
    "better",
    "worse",
    "better and worse",
    "within noise",
    "same",
    "cannot tell",
)
CHANGED = (BETTER, WORSE, MIXED)


@dataclass(frozen=True)
class Change:
    """One metric of one row: its mean over seeds in A and in B, as values of the records.

    `difference`: B - A of the losses by window, in `unit`; None if it cannot be told, and `why` says so. `verdict`: B
    is better, worse, not told apart from A, the same to four decimals, or it cannot be told.
    """

    metric: str
    a: Sequence[ValueRecord]
    b: Sequence[ValueRecord]
    difference: Difference | None
    unit: str
    verdict: str
    why: str = ""


@dataclass(frozen=True)
class RowChange:
    """One row of both runs.

    `masks`: share of mask bits that differ, 0 for equal masks; None for the dense row; NaN if they differ and their
    files are not there. `costs`: kind -> mean cost in A and in B.
    """

    key: Key
    seeds: Sequence[int]
    changes: Sequence[Change]
    masks: float | None
    costs: Mapping[str, tuple[float, float]]

    @property
    def name(self) -> str:
        """Label and pattern."""
        return named(self.key)

    @property
    def verdict(self) -> str:
        """The verdict of the metrics together, by those whose losses by window are known, if there are any."""
        judged = [change.verdict for change in self.changes if change.difference]
        found = judged or [change.verdict for change in self.changes]
        if {BETTER, WORSE} <= set(found):
            return MIXED
        order = (BETTER, WORSE, WITHIN, SAME, UNKNOWN) if judged else (UNKNOWN, SAME)
        return next(verdict for verdict in order if verdict in found)

    @property
    def decisive(self) -> Change:
        """The first change with the verdict of the row."""
        wanted = (BETTER, WORSE) if self.verdict == MIXED else (self.verdict,)
        return next(change for change in self.changes if change.verdict in wanted)


@dataclass(frozen=True)
class Comparison:
    """Two runs: what changed in their `protocol` and other `settings`, a line each, and the rows of both.

    `only_a`, `only_b`: rows that one run lacks, by label, pattern and seed, failed ones with their error.
    """

    a: Side
    b: Side
    protocol: Sequence[str]
    settings: Sequence[str]
    rows: Sequence[RowChange]
    only_a: Sequence[str]
    only_b: Sequence[str]

    @property
    def failed(self) -> bool:
        """True if a row of one run failed in the other."""
        return any("failed" in name for name in (*self.only_a, *self.only_b))

    @property
    def changed(self) -> bool:
        """True if some row changed by more than noise."""
        return any(row.verdict in CHANGED for row in self.rows)

    @property
    def judged(self) -> bool:
        """True if every row of both runs could be judged."""
        return not self.failed and not self.of(UNKNOWN)

    def of(self, verdict: str) -> list[RowChange]:
        """Return the rows with a verdict."""
        return [row for row in self.rows if row.verdict == verdict]


def compared_runs(a: Results, b: Results) -> Comparison:
    """Return the comparison of two runs. Raises `NMBenchError` for runs that have nothing to compare."""
    first, second = side(a), side(b)
    refuse_unlike(first, second)
    protocol = protocol_changes(first, second)
    rows = list(row_changes(first, second, bool(protocol)))
    only = list(alone(first, second)), list(alone(second, first))
    return Comparison(first, second, protocol, changed_settings(first, second), rows, *only)


def row_changes(a: Side, b: Side, unlike: bool) -> Iterator[RowChange]:
    """Yield the rows of both runs that share a seed."""
    for key, row in a.rows.items():
        ours, theirs = a.records_of(key), b.records_of(key)
        seeds = [seed for seed in ours if seed in theirs]
        if seeds:
            pairs = [(ours[seed], theirs[seed]) for seed in seeds]
            changes = changes_of(row, b.rows[key], pairs, comparable_metrics(a, b), unlike)
            known = [seed for seed in seeds if seed is not None]
            if found := list(changes):
                yield RowChange(key, known, found, masks_of(a, b, pairs), costs(pairs))


def changes_of(
    a: Row, b: Row, pairs: Sequence[tuple[Record, Record]], metrics: Sequence[str], unlike: bool
) -> Iterator[Change]:
    """Yield the change of every metric that the row has on both sides and at every seed."""
    for metric in metrics:
        if all(metric in record["metrics"] for pair in pairs for record in pair):
            ours, theirs = ([pair[place]["metrics"][metric] for pair in pairs] for place in (0, 1))
            seeds = [pair[0]["seed"] or 0 for pair in pairs]
            text = losses_name(metric)
            unit = ours[0].get("unit", "") if text == metric else "nats"
            found = None if unlike else difference_of(a, b, text, seeds)
            if isinstance(found, Difference):
                lower = text != metric or ours[0]["lower_is_better"]
                yield Change(metric, ours, theirs, found, unit, judged(found, lower))
            else:
                why = "the protocols differ" if unlike else found or ""
                same = not unlike and [v["value"] for v in ours] == [v["value"] for v in theirs]
                yield Change(metric, ours, theirs, None, unit, SAME if same else UNKNOWN, "" if same else why)


def losses_name(metric: str) -> str:
    """Return the name under which the losses of a metric are kept: perplexity has those of its text."""
    word, _, text = metric.partition(":")
    return text if word == PERPLEXITY else metric


def difference_of(a: Row, b: Row, text: str, seeds: Sequence[int]) -> Difference | str:
    """Return the paired difference B - A over windows and seeds, or why there is none."""
    ours, theirs = a.on(text, seeds), b.on(text, seeds)
    if ours is None or theirs is None:
        missing = " and ".join(side for side, found in (("A", ours), ("B", theirs)) if found is None)
        return f"{missing} kept no losses by window for it"
    if ours.shape != theirs.shape:
        return f"A measured {ours.shape[1]} windows, B {theirs.shape[1]}"
    if ours.shape[1] < 2:
        return "one window has no interval"
    return paired(theirs, ours)


def judged(found: Difference, lower_is_better: bool) -> str:
    """Return the verdict of a difference B - A."""
    if max(abs(found.mean), abs(found.low), abs(found.high)) < ROUNDING:
        return SAME
    if not found.clear:
        return WITHIN
    return BETTER if (found.mean < 0) == lower_is_better else WORSE


def masks_of(a: Side, b: Side, pairs: Sequence[tuple[Record, Record]]) -> float | None:
    """Return the share of mask bits that differ, over the seeds; see `RowChange`."""
    shares = [share for pair in pairs if (share := share_of(a, b, *pair)) is not None]
    return fmean(shares) if shares else None


def share_of(a: Side, b: Side, ours: Record, theirs: Record) -> float | None:
    """Return the share of mask bits that differ between two records: by the digests of the masks, then by the files."""
    proofs = ours["proof"], theirs["proof"]
    if proofs[0] is None or proofs[1] is None:
        return None
    if proofs[0]["masks_digest"] == proofs[1]["masks_digest"]:
        return 0.0
    files = [one.directory / "masks" / f"{file_name(record)}.safetensors" for one, record in ((a, ours), (b, theirs))]
    return differing_bits(files[0], files[1]) if all(file.exists() for file in files) else float("nan")


def costs(pairs: Sequence[tuple[Record, Record]]) -> dict[str, tuple[float, float]]:
    """Return the mean costs in A and B of the kinds that are known on both sides; nothing for the dense row."""
    if pairs[0][0]["pattern"] is None:
        return {}
    found = [(cost_of(ours), cost_of(theirs)) for ours, theirs in pairs]
    kinds = [kind for kind in COSTS if all(kind in one and kind in two for one, two in found)]
    return {kind: (fmean(one[kind] for one, _ in found), fmean(two[kind] for _, two in found)) for kind in kinds}


def alone(one: Side, other: Side) -> Iterator[str]:
    """Yield the rows of `one` that `other` has not, or not whole."""
    failed = {(r["label"], r["pattern"], r["seed"]): r.get("error", "") for r in other.failed}
    for key in one.rows:
        seeds = one.records_of(key)
        missing = [seed for seed in seeds if seed not in other.records_of(key)]
        for seed in missing:
            name = named(key) + ("" if seed is None else f" seed {seed}")
            error = failed.get((*key, seed))
            yield name if error is None else f"{name} (failed there: {error})"
