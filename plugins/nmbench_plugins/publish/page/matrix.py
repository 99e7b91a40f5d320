"""The matrix of paired differences: is A better than B?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nmbench.evaluation import Difference
from nmbench.results import Standing, named_seeds
from nmbench_plugins.publish.page.figures import badge, minus
from nmbench_plugins.publish.page.markup import el, folded, named, note, text
from nmbench_plugins.publish.page.view import MANY, View

NOTE = (
    "A cell is the mean loss of its row minus that of its column on the same windows: below zero (blue) the row is "
    "better, above zero (orange) it is worse, ~: the paired 95 % interval holds zero, =: the very same losses. "
    "Point at a cell for the interval."
)
LOSSLESS = (
    "No pair of rows can be compared: the run directories hold no losses/ of these rows, or the rows have no seed in "
    "common. The intervals against the dense model, in the table above, are those of the records."
)


def matrices(view: View) -> str:
    """Return a matrix for every protocol, pattern and text; the first of each pattern is open."""
    seen: set[tuple[str, str]] = set()
    parts = []
    for standing in filter(comparable, view.standings):
        key = (standing.protocol, standing.pattern)
        parts.append(folded(title(view, standing), matrix(standing), opened=key not in seen))
        seen.add(key)
    return note(NOTE) + "\n".join(parts) if parts else note(LOSSLESS)


def comparable(standing: Standing) -> bool:
    """True if a standing has two rows and its text is one that the dense model predicts."""
    return standing.ranked and len(standing.rows) > 1


def title(view: View, standing: Standing) -> str:
    """Return the line above a matrix: protocol, pattern, text, unit and seeds."""
    letter = view.letter(standing.protocol)
    model = next(protocol.model for protocol in view.protocols if protocol.letter == letter)
    where = f"{badge(letter)} {named(model)} {text(standing.shown)} on {named(standing.text)}"
    return f"{where}: {text(standing.unit or 'units of the metric')}, {text(named_seeds(standing.seeds))}"


def matrix(standing: Standing) -> str:
    """Return the table of all pairs of the best rows."""
    shown = list(range(min(MANY + 4, len(standing.rows))))
    names = [standing.rows[place].name for place in shown]
    head = el("th", "") + "".join(el("th", str(place + 1), title=names[place], scope="col") for place in shown)
    lines = [line(standing, place, shown, names) for place in shown]
    more = len(standing.rows) - len(shown)
    left_out = note(f"The {more} rows behind the best {len(shown)} are left out.") if more else ""
    whole = el("table", f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>", class_="matrix")
    return el("div", whole, class_="scroll") + left_out


def line(standing: Standing, place: int, shown: Sequence[int], names: Sequence[str]) -> str:
    """Return one row of the matrix."""
    head = el("th", f"<b>{place + 1}</b> {text(names[place])}", scope="row", title=names[place])
    return el("tr", head + "".join(cells(standing, place, shown, names)))


def cells(standing: Standing, place: int, shown: Sequence[int], names: Sequence[str]) -> Iterator[str]:
    """Yield the cells of one row: the difference to every other row."""
    for other in shown:
        if other == place:
            yield el("td", "", class_="self")
        else:
            found = standing.difference(place, other)
            sign, style = verdict(found)
            value = el("span", minus(f"{found.mean:+.3f}"), class_="value")
            about = f"{names[place]} against {names[other]}: {found} ({found.windows} windows)"
            yield el("td", f'<span class="sign">{sign}</span> {value}', class_=style, title=minus(about))


def verdict(found: Difference) -> tuple[str, str]:
    """Return the sign of a difference and the class of its cell."""
    if found.clear:
        return ("&lt;", "better") if found.mean < 0 else ("&gt;", "worse")
    return ("=", "tie") if found.low == found.high == 0 else ("~", "tie")
