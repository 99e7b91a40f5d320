"""The start of logits from a probability that users understand: that a draw of a group leaves its start."""

from __future__ import annotations

from collections.abc import Callable

LARGEST = 700.0  # lead: exp of it is finite


def lead_for(leaving: Callable[[float], float], leave: float) -> float:
    """Return the lead at which a group leaves its start with probability `leave`, by bisection.

    `leaving` is this probability at a lead, and falls with it. At or above the probability at lead 0, that of an even
    draw, the lead is 0.
    """
    low, high = 0.0, LARGEST
    if leave >= leaving(low):
        return low
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if leaving(middle) > leave else (low, middle)
    return (low + high) / 2
