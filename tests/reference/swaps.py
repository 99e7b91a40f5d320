"""Swaps in plain loops, float64: every candidate is judged by the whole error of its row, computed anew.

Nothing of nmbench is used. `goal` `[tokens]` is what a row's outputs on `x` `[tokens, in]` are to come near to.
"""

import functools
import itertools
import math

import numpy as np

MOST_PATTERNS = 128
BETTER = 1e-9  # relative; less is taken for rounding


def error(w: np.ndarray, kept: np.ndarray, x: np.ndarray, goal: np.ndarray) -> float:
    """The squared distance of one row's outputs from its goal."""
    return float(((x @ (w * kept) - goal) ** 2).sum())


def candidates(kept: np.ndarray, unit: int) -> list[np.ndarray]:
    """The masks that a group with mask `kept` may change to: all of its pattern, or all at one exchange of units."""
    return [np.repeat(mask, unit) for mask in candidates_of_units(kept[::unit])]


def candidates_of_units(kept: np.ndarray) -> list[np.ndarray]:
    """Those masks, one entry for each unit."""
    keep, group = int(kept.sum()), len(kept)
    if math.comb(group, keep) <= MOST_PATTERNS:
        return [mask for mask in masks_of(group, keep) if (mask != kept).any()]
    pairs = itertools.product(np.flatnonzero(kept), np.flatnonzero(~kept))
    return [kept ^ marked(group, pair) for pair in pairs]


@functools.cache
def masks_of(group: int, keep: int) -> list[np.ndarray]:
    """All masks of a group, which nobody writes to."""
    return [marked(group, chosen) for chosen in itertools.combinations(range(group), keep)]


def marked(group: int, places: tuple[int, ...]) -> np.ndarray:
    """A mask that is True at `places`."""
    mask = np.zeros(group, dtype=bool)
    mask[list(places)] = True
    return mask


def refine_row(w: np.ndarray, kept: np.ndarray, x: np.ndarray, goal: np.ndarray, group: int, unit: int, sweeps: int):
    """The row's mask after each sweep, up to the first that changes nothing."""
    history = [kept.copy()]
    for _ in range(sweeps):
        now = history[-1].copy()
        for start in range(0, len(w), group):
            place, best, least = slice(start, start + group), None, error(w, now, x, goal) * (1 - BETTER)
            for candidate in candidates(now[place], unit):
                trial = now.copy()
                trial[place] = candidate
                if (cost := error(w, trial, x, goal)) < least:
                    best, least = candidate, cost
            if best is not None:
                now[place] = best
        history.append(now)
        if (now == history[-2]).all():
            break
    return history
