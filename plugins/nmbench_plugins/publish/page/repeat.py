"""What each label stands for, and how each row is repeated: command, versions, hashes."""

from __future__ import annotations

from nmbench.results import Record, named_seeds, repeat_command, run_command
from nmbench_plugins.publish.page.figures import badge
from nmbench_plugins.publish.page.markup import el, folded, named, table, text
from nmbench_plugins.publish.page.view import Line, Protocol, View

HASHES = ("job_digest", "protocol_digest", "spec_digest", "calibration_digest", "pool_digest", "measured_digest")


def labels(view: View) -> str:
    """Return the table of labels: method, start, options."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for line in view.lines:
        if line.record["method"]:
            key = (
                line.record["label"],
                str(line.record["method"]),
                str(line.record["started_from"] or "-"),
                options_text(line.record),
            )
            rows.setdefault(key, []).append(line.letter)
    head = ["label", "method", "begins with", "options", "protocols"]
    return table(
        head,
        ([*map(text, key), "".join(map(badge, dict.fromkeys(where)))] for key, where in rows.items()),
        class_="plain words",
    )


def options_text(record: Record) -> str:
    """Return the options of a row as they were resolved."""
    return ", ".join(f"{name}={value}" for name, value in record["options"].items()) or "none"


def repeats(view: View) -> str:
    """Return for every run directory its command, and for every row its own command and hashes, folded."""
    return "\n".join(filter(None, (of_protocol(view, protocol) for protocol in view.protocols)))


def of_protocol(view: View, protocol: Protocol) -> str:
    """Return the entries of one protocol under its line."""
    runs = "".join(el("pre", text(run_command(run))) for run in protocol.runs)
    lines = "".join(folded(title(line), of_row(line), id=line.anchor, class_="row") for line in protocol.lines)
    return el("h3", f"{badge(protocol.letter)} {named(protocol.model)}") + el("p", "All rows:") + runs + lines


def title(line: Line) -> str:
    """Return the line that opens an entry."""
    seeds = f" {named_seeds(line.seeds)}" if line.seeds else ""
    return text(f"{line.name} {line.pattern if line.record['pattern'] else ''}{seeds}")


def of_row(line: Line) -> str:
    """Return the command of a row, its versions, and the hashes of every seed."""
    versions = ", ".join(f"{name} {value}" for name, value in line.record["environment"].items())
    hashes = "\n".join(hashes_of(record) for record in line.records)
    pattern = line.record["pattern"]
    again = repeat_command(line.record, line.run, [pattern], line.seeds) if pattern else ""
    command = el("pre", text(again)) if again else ""
    return command + el("p", text(versions)) + el("pre", text(hashes))


def hashes_of(record: Record) -> str:
    """Return the hashes of one job in a line."""
    proof = record["proof"]
    known = {name.replace("_digest", ""): record.get(name) for name in HASHES}
    known |= {"masks": proof["masks_digest"] if proof else None}
    seed = "" if record["seed"] is None else f"seed {record['seed']}: "
    return seed + ", ".join(f"{name} {str(value)[:16]}" for name, value in known.items() if value)
