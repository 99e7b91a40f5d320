"""Numbers as people read them, with the badge of their protocol."""

from __future__ import annotations

import math

from nmbench.evaluation import Difference
from nmbench_plugins.publish.page.markup import el, text

UNITS = {"seconds": "seconds to prune", "tokens": "forward + 2 × backward tokens", "bytes": "peak GPU memory, GiB"}
MINUS = "−"


def badge(letter: str) -> str:
    """Return the badge of a protocol, which leads to the description of the protocol."""
    return el(
        "a",
        text(letter),
        href=f"#protocol-{letter}",
        class_=f"badge p{ord(letter[0]) % 6}",
        aria_label=f"protocol {letter}",
    )


def minus(value: str) -> str:
    """Return a number with a minus sign for its hyphens."""
    return value.replace("-", MINUS)


def signed(value: Difference, digits: int = 4) -> str:
    """Return a difference with its interval, if it has one."""
    ends = f" [{value.low:+.{digits}f}, {value.high:+.{digits}f}]"
    return minus(f"{value.mean:+.{digits}f}") + ("" if math.isnan(value.low) else el("small", minus(ends)))


def interval(value: Difference) -> dict[str, float]:
    """Return the ends of an interval as data of a chart; nothing if there is no interval."""
    return {} if math.isnan(value.low) else {"low": value.low, "high": value.high}


def amount(kind: str, value: float) -> str:
    """Return a cost with its unit: `12.3 s`, `4.5 M tokens`, `1.25 GiB`."""
    if kind == "bytes":
        return f"{value / 2**30:.2f} GiB"
    return seconds(value) if kind == "seconds" else f"{large(value)} tokens"


def seconds(value: float) -> str:
    """Return a duration in seconds, or hours and minutes above an hour."""
    if value >= 3600:
        return f"{value // 3600:.0f} h {value % 3600 // 60:02.0f} min"
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def large(value: float) -> str:
    """Return a number with k, M or G."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"
