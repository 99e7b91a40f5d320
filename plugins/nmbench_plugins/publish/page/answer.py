"""The answer in a sentence for every protocol and pattern."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nmbench.evaluation import Difference
from nmbench.results import Standing
from nmbench_plugins.publish.page.figures import amount, badge, signed
from nmbench_plugins.publish.page.markup import el, listed, named, text
from nmbench_plugins.publish.page.view import Line, Protocol, View

NEAR = 0.05  # nats within which a cheaper row is named
LOSSLESS = "the run directory lacks their losses/"
SEEDLESS = "they have no seed in common"


@dataclass(frozen=True)
class Placed:
    """A row with its difference to dense and to the best row, in nats."""

    line: Line
    over_dense: Difference | None
    behind: float
    apart: bool | None


def answers(view: View) -> str:
    """Return the sentences."""
    found = (sentence(view, *group) for group in view.groups)
    return "\n".join(el("p", one, class_="answer") for one in found if one)


def sentence(view: View, protocol: Protocol, pattern: str) -> str:
    """Return the sentence on one pattern; nothing if no row has a difference to dense."""
    judged = protocol.text()
    if judged is None:
        return ""
    where = f"at {text(pattern)} for {el('b', named(protocol.model))}{badge(protocol.letter)}"
    if protocol.unranked(judged):
        return f"No answer {where}: the dense model does not predict {named(judged)}."
    standing = view.standing(protocol, pattern, judged)
    placed = by_losses(standing, protocol.at(pattern)) if standing else by_record(protocol.at(pattern), judged)
    seeds = text(standing.remark) if standing else ""
    return "; ".join([best(placed[0], where, judged), *ties(placed), *cheap(placed)]) + f"{seeds}." if placed else ""


def best(found: Placed, where: str, judged: str) -> str:
    """Return the clause on the best row."""
    over = f", {signed(found.over_dense)} nats over dense on {named(judged)}" if found.over_dense else ""
    return f"Best {where}: {el('b', link(found.line))}{over}"


def link(line: Line) -> str:
    """Return the name of a row, which leads to how the row is repeated."""
    return el("a", text(line.name), href=f"#{line.anchor}")


def by_losses(standing: Standing, lines: Sequence[Line]) -> list[Placed]:
    """Return the rows of a standing, best first, originals before their copies."""
    by_name = {line.name: line for line in lines}
    places = [place for place, row in enumerate(standing.rows) if row.name in by_name]
    means = standing.losses.mean(dim=1).tolist()
    places.sort(key=lambda place: (means[place], by_name[standing.rows[place].name].copied))
    return [
        Placed(
            by_name[standing.rows[place].name],
            standing.over_dense(place),
            means[place] - means[places[0]],
            standing.difference(place, places[0]).clear,
        )
        for place in places
    ]


def by_record(lines: Sequence[Line], judged: str) -> list[Placed]:
    """Return rows by their recorded differences to dense, best first; none can be told apart from another."""
    known = [(line, over) for line in lines if (over := line.over_dense(judged))]
    known.sort(key=lambda item: (item[1].mean, item[0].copied))
    return [Placed(line, over, over.mean - known[0][1].mean, None) for line, over in known]


def ties(placed: Sequence[Placed]) -> Iterator[str]:
    """Yield the clause on rows that cannot be told apart from the best."""
    others = placed[1:]
    if any(one.apart is None for one in others):
        yield f"rows were not compared pair by pair, because {LOSSLESS if common_seeds(placed) else SEEDLESS}"
    elif others:
        tied = [link(one.line) for one in others if not one.apart and not one.line.copied]
        yield f"not told apart from {listed(tied)}" if tied else "told apart from every other row"


def common_seeds(placed: Sequence[Placed]) -> set[int]:
    """Return the seeds that all rows have."""
    return set.intersection(*(set(one.line.seeds) for one in placed))


def cheap(placed: Sequence[Placed]) -> Iterator[str]:
    """Yield the clause on the cheapest row near the best one."""
    near = [one for one in placed if one.behind <= NEAR and "seconds" in one.line.costs]
    near = [one for one in near if not one.line.copied] or near
    if not near:
        return
    found = min(near, key=lambda one: one.line.costs["seconds"])
    cost = amount("seconds", found.line.costs["seconds"])
    if found is placed[0]:
        yield f"it is also the cheapest within {NEAR} nats ({cost})"
    elif not math.isnan(found.behind):
        yield f"cheapest within {NEAR} nats: {link(found.line)} ({cost}, {found.behind:+.4f} nats)"
