"""The penalty rho from step to step, by the share of weights that have come or gone since the last look."""

from __future__ import annotations

from typing import NamedTuple

EVERY = 3  # iterations between two looks
SETTLING = 30  # iterations before a small change ends the search
SMALL_CHANGE = 3e-4
HIGHEST = 1e6


class Step(NamedTuple):
    """The next penalty, whether it has ever been raised, and what follows: a new search, or the end of this one."""

    penalty: float
    raised: bool
    restart: bool = False
    done: bool = False


def next_step(penalty: float, raised: bool, change: float, iterations: int) -> Step:
    """Return the step after `iterations`; `change` counts weights that were kept or dropped, relative to those kept.

    Until the penalty has been raised once, it is too high for the mask to move away from the start: it is lowered, and
    the search begins again if the mask moved a little. The figures are those of the paper's code.
    """
    settled = iterations > SETTLING and change < SMALL_CHANGE
    if (raised and change == 0) or settled:
        return Step(penalty, raised, done=True)
    if change > 0.005:
        return Step(min((1.3 if change > 0.1 else 1.2) * penalty, HIGHEST), True)
    if raised:
        return Step(min(1.1 * penalty, HIGHEST), True)
    return Step(penalty / 5, False, restart=change > 0)
