"""The share of kept weights that the masks of two rows have in common, where run directories hold masks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import nmbench
from nmbench.results import file_name, mask_overlap
from nmbench_plugins.publish.page.figures import badge
from nmbench_plugins.publish.page.markup import el, folded, named, note, text
from nmbench_plugins.publish.page.view import MANY, Line, Protocol, View

NOTE = (
    "A cell is the share of the weights kept by its row that its column keeps too. By chance it would be the share of "
    "weights that the pattern keeps."
)
LARGEST = 4 * 2**30  # bytes of packed masks that are read for one table


def overlaps(view: View) -> str:
    """Return a table for every protocol and pattern with two rows whose masks are on disk; nothing without masks."""
    found = [part for group in view.groups for part in overlap(view, *group)]
    return note(NOTE) + "\n".join(found) if found else ""


def overlap(view: View, protocol: Protocol, pattern: str) -> Iterator[str]:
    """Yield the table of one pattern, for the first seed of which two rows have masks."""
    found = rows_with_masks(view, protocol, pattern)
    if len(found) < 2:
        return
    paths = [path for _, _, path in found]
    title = f"{badge(protocol.letter)} {named(protocol.model)} {text(pattern)}, seed {found[0][1]}"
    if sum(path.stat().st_size for path in paths) > LARGEST:
        yield note(f"{protocol.model} {pattern}: masks of more than {LARGEST >> 30} GiB are not compared.")
        return
    try:
        yield folded(title, matrix([name for name, _, _ in found], mask_overlap(paths).tolist()), opened=True)
    except nmbench.NMBenchError as error:
        yield note(f"{protocol.model} {pattern}: {error}")


def rows_with_masks(view: View, protocol: Protocol, pattern: str) -> list[tuple[str, int, Path]]:
    """Return name, seed and mask file of the rows of the first common seed, copies left out, at most `MANY`."""
    lines = [line for line in protocol.at(pattern) if not line.copied]
    seeds = [seed for line in lines for seed in line.seeds]
    for seed in sorted(set(seeds), key=lambda seed: -seeds.count(seed)):
        found = [(line.name, seed, path) for line in lines if (path := mask_of(line, seed)) is not None]
        if len(found) > 1:
            return found[:MANY]
    return []


def mask_of(line: Line, seed: int) -> Path | None:
    """Return the mask file of a row at a seed; None if there is none."""
    record = next((record for record in line.records if record["seed"] == seed), None)
    run = line.run if record is None else record.get("directory", line.run)
    path = Path(run) / "masks" / f"{file_name(record)}.safetensors" if record else None
    return path if path is not None and path.is_file() else None


def matrix(names: list[str], shares: list[list[float]]) -> str:
    """Return the table; a larger share is darker."""
    head = el("th", "") + "".join(el("th", str(place + 1), title=name, scope="col") for place, name in enumerate(names))
    lines = [
        el(
            "tr",
            el("th", f"<b>{place + 1}</b> {text(name)}", scope="row", title=name)
            + "".join(cell(names[place], other, value) for other, value in zip(names, row, strict=True)),
        )
        for place, (name, row) in enumerate(zip(names, shares, strict=True))
    ]
    whole = el("table", f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>", class_="matrix")
    return el("div", whole, class_="scroll")


def cell(name: str, other: str, value: float) -> str:
    """Return the cell of two rows."""
    if name == other:
        return el("td", "", class_="self")
    about = f"{name} and {other}: {value:.2%}"
    return el("td", f"{100 * value:.0f}", title=about, style=f"--share:{100 * value:.0f}%", class_="share")
