"""The lines below a table: the proof, what the columns mean, notes on rows, failures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nmbench.results.doubt_lines import listed, named
from nmbench.results.format import Record
from nmbench.results.joining import apart_notes
from nmbench.results.ranking import pattern_of

MEBIBYTE = 2**20
LONG, BUSY = 5.0, 0.7  # seconds; processor seconds per second under which a machine was busy
MARKED = "rank: 1 + rows that are clearly better; *: best; ~: not told apart from the best"
FRONTS = "pareto: at these costs no row of its pattern is both better and cheaper"


def proof_line(records: Sequence[Record]) -> str:
    """One line on the proof of all pruned rows, and the groups that were checked; nothing without pruned rows."""
    pruned = [record for record in records if record["pattern"] and record["status"] == "ok"]
    proven = [record for record in pruned if record["proof"]]
    if not pruned:
        return ""
    groups: dict[str, list[str]] = {}
    for record in proven:
        groups.setdefault(pattern_of(record), []).append(groups_of(record))
    counts = "; ".join(f"{' or '.join(dict.fromkeys(found))} at {pattern}" for pattern, found in groups.items())
    how_many = f"all {len(pruned)}" if len(proven) == len(pruned) else f"{len(proven)} of {len(pruned)}"
    return f"Strict N:M: every group of {how_many} pruned rows is proven" + (f" ({counts})" if counts else "")


def groups_of(record: Record) -> str:
    """Return the number of groups that the proof of a row counted."""
    assert record["proof"] is not None
    return str(record["proof"]["groups"])


def row_notes(records: Sequence[Record]) -> str:
    """One line for every kind of row that is not, or hardly, what its method asks for: a copy, a repair that is not
    better than its start, statistics of too few tokens.
    """
    rows: dict[str, list[str]] = {}
    for record in records:
        if text := "; ".join(remarks(record)):
            rows.setdefault(text, []).append(named(record))
    lines = [f"NOTE {listed(names)}: {text}." for text, names in rows.items()]
    return "\n".join([*lines, *busy_note(records), *apart_notes(records)])


def busy_note(records: Sequence[Record]) -> list[str]:
    """Return one line on all rows that were pruned while the machine was busy; nothing without any."""
    waiting = [f"{named(r)} ({worked(r):.1f} of {r['seconds']['prune']:.1f} s)" for r in records if waited(r)]
    why = "the machine was busy: processors worked only a part of the seconds of pruning, which say little"
    return [f"NOTE {listed(waiting)}: {why}."] if waiting else []


def remarks(record: Record) -> Iterator[str]:
    """Yield what is to be said of one row."""
    unreached, few = record["experts"].get("never_reached", []), record["experts"].get("under_calibrated", {})
    for first in unreached[:1]:
        yield (
            f"no token was routed to {len(unreached)} weights of experts, as {first}: pruned by the statistics of all "
            f"tokens"
        )
    for name, tokens in sorted(few.items(), key=lambda item: item[1])[:1]:
        yield f"fewer tokens than inputs were routed to {len(few)} weights of experts, as {tokens} to {name}"
    if undone(record):
        found = record["notes"]["confirmation"]
        yield (
            f"{found['windows']} unseen selection windows do not confirm that the repair is better than its start "
            f"{record['started_from']} ({found['nats']:+.4f} nats): the weights of the start are measured"
        )
    if record["copied_from"]:
        yield f"the same work as {record['copied_from']}, done once; all figures are copied from there"


def undone(record: Record) -> bool:
    """True if the host returned to the start of a repair, which unseen selection windows did not confirm."""
    confirmation = record["notes"].get("confirmation") if record.get("repairs") else None
    return confirmation is not None and not confirmation["holds"]


def waited(record: Record) -> bool:
    """True if pruning on a CPU was long and waited for most of the time, for other processes."""
    worked_seconds, seconds = worked(record), record["seconds"]["prune"]
    on_cpu = record["environment"].get("device") == "cpu"
    if worked_seconds is None or seconds is None:
        return False
    return on_cpu and seconds > LONG and worked_seconds < BUSY * seconds


def worked(record: Record) -> float | None:
    """Processor seconds of pruning; of older records the share of the process that ended the job, times its seconds."""
    seconds = record["seconds"]
    if seconds["prune_cpu"] is not None or seconds["cpu_share"] is None or seconds["prune"] is None:
        return seconds["prune_cpu"]
    return seconds["cpu_share"] * seconds["prune"]


def kept_weights(records: Sequence[Record]) -> str:
    """One line on the size of the repaired weights in the run directory; nothing if there are none."""
    sizes = [size for record in records if (size := record.get("kept_bytes"))]
    if not sizes:
        return ""
    rows_text = "1 row" if len(sizes) == 1 else f"{len(sizes)} rows"
    return (
        f"NOTE weights/ holds the repaired weights of {rows_text}, {sum(sizes) / MEBIBYTE:.1f} MiB; with "
        f"--no-keep-weights, `nmbench export` makes them again."
    )


def failures(records: Sequence[Record]) -> str:
    """One line for every job that failed."""
    return "\n".join(
        f"FAILED {named(record)}: {record['error']} (traceback: {record['traceback']})"
        for record in records
        if record["status"] != "ok"
    )
