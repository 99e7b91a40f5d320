"""Names beside the points of a plot, each where it covers least of other names, points, intervals and the frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

SIDES = (  # offset in points, horizontal and vertical alignment; the first that covers nothing is taken
    *((7, 4, "left", "bottom"), (7, -4, "left", "top"), (-7, 4, "right", "bottom"), (-7, -4, "right", "top")),
    *((0, 8, "center", "bottom"), (0, -8, "center", "top"), (8, 0, "left", "center"), (-8, 0, "right", "center")),
    *((12, 14, "left", "bottom"), (12, -14, "left", "top"), (-12, 14, "right", "bottom"), (-12, -14, "right", "top")),
)
SIZE = 8  # points of the font
CONFUSING = 400.0  # square pixels that a name may cover rather than be nearer to another point
OUTSIDE = 10.0  # how much worse it is to leave the panel than to cover something


def place(axes: Any, named: Sequence[tuple[str, float, float]]) -> None:
    """Write the name of each point `(name, x, y)`, whose panel has been laid out, into the panel."""
    taken = [box(child) for child in (*axes.lines, *axes.collections) if drawn_at_points(child)]
    points = axes.transData.transform([(x, y) for _, x, y in named]).tolist() if named else []
    for (name, x, y), point in zip(named, points, strict=True):
        others = [other for other in points if other != point]
        tried = [written(axes, name, x, y, side) for side in SIDES]
        boxes = [box(text) for text in tried]
        frame = axes.get_window_extent()
        costs = [cost(found, taken, frame) + CONFUSING * confusing(found, point, others) for found in boxes]
        best = costs.index(min(costs))
        taken.append(boxes[best])
        for index, text in enumerate(tried):
            if index != best:
                text.remove()


def confusing(found: Any, point: Sequence[float], others: Sequence[Sequence[float]]) -> bool:
    """Return True if a box is nearer to the point of another name, or as near."""
    return any(distance(found, other) <= distance(found, point) for other in others)


def distance(found: Any, point: Sequence[float]) -> float:
    """Return the distance of a point from a box, in pixels."""
    across = max(found.x0 - point[0], 0.0, point[0] - found.x1)
    along = max(found.y0 - point[1], 0.0, point[1] - found.y1)
    return math.hypot(across, along)


def drawn_at_points(child: Any) -> bool:
    """Return True for points and intervals; names may cross the steps of a front."""
    return not hasattr(child, "get_drawstyle") or child.get_drawstyle() == "default"


def written(axes: Any, name: str, x: float, y: float, side: tuple[float, float, str, str]) -> Any:
    """Return a name that is written beside a point."""
    right, up, horizontal, vertical = side
    return axes.annotate(
        name, (x, y), (right, up), textcoords="offset points", ha=horizontal, va=vertical, fontsize=SIZE
    )


def box(artist: Any) -> Any:
    """Return the box of what is drawn, in pixels."""
    return artist.get_window_extent()


def cost(found: Any, taken: Sequence[Any], frame: Any) -> float:
    """Return the area that a box covers of others, and, much worse, outside of the frame; in pixels."""
    inside = overlap(found, frame)
    return sum(overlap(found, other) for other in taken) + OUTSIDE * (found.width * found.height - inside)


def overlap(one: Any, other: Any) -> float:
    """Return the area that two boxes share; a line without width has one pixel."""
    width = min(one.x1, max(other.x1, other.x0 + 1)) - max(one.x0, other.x0)
    height = min(one.y1, max(other.y1, other.y0 + 1)) - max(one.y0, other.y0)
    return max(0.0, width) * max(0.0, height)
