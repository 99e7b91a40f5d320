"""Three or four kept weights of a group: a recursion over subsets with positive terms only.

Give every kept weight an exponential clock of rate y_i = w_i / D, and all dropped weights together one clock of rate 1.
P(S) = H(S) is the chance that all clocks of S ring before the clock of the dropped. For B within S, by the first clock,

    H(B) = sum_{k in B} y_k / (1 + Y_B) * H(B - k),      Y_B = sum of y over B,      H(empty) = 1
    M_i(B) = H(B - i) - H(B) = sum_{k in B - i} y_k / (1 + Y_B) * M_i(B - k),        M_i({i}) = 1 / (1 + y_i)
    G_i(B) = dH(B)/dlogit_i = y_i / (1 + Y_B) * M_i(B) + sum_{k in B - i} y_k / (1 + Y_B) * G_i(B - k)

M_i is the chance that all clocks of B but clock i ring before the clock of the dropped. Divided by the product of r_i =
y_i / (1 + y_i) over B (and M, G by 1 - r_i instead of r_i for i) all weights become (1 + y_k) / (1 + Y_B) <= 1, so
nothing under- or overflows.
"""

import functools
from collections.abc import Iterable, Iterator
from itertools import chain, combinations

import torch
from torch import Tensor

Subset = tuple[int, ...]


def lift(rate: Tensor) -> Tensor:
    """Return H(S) / prod r_i, [n], between 1 and keep!, from rate [keep, n]."""
    lifts: dict[Subset, Tensor] = {(): torch.ones_like(rate[0])}
    for subset in _subsets(len(rate)):
        step = _step(rate, subset)  # [keep, n]
        lifts[subset] = _sum(step[k] * lifts[_without(subset, k)] for k in subset)
    return lifts[subset]


def kept_gradient(rate: Tensor) -> Tensor:
    """Return grad log P for the kept, [keep, n], from rate [keep, n]: G_i(S) / H(S)."""
    keep = len(rate)
    lifts: dict[Subset, Tensor] = {(): torch.ones_like(rate[0])}
    alone = torch.eye(keep, dtype=rate.dtype, device=rate.device)  # [keep, keep]
    misses: dict[Subset, Tensor] = {(i,): alone[:, i : i + 1] for i in range(keep)}
    gains: dict[Subset, Tensor] = {(): torch.zeros_like(rate)}  # row i is 0 in subsets without i, in misses too
    for subset in _subsets(keep):
        step = _step(rate, subset)  # [keep, n]
        lifts[subset] = _sum(step[k] * lifts[_without(subset, k)] for k in subset)
        if len(subset) > 1:
            misses[subset] = _sum(step[k] * misses[_without(subset, k)] for k in subset)
        gains[subset] = step * misses[subset] + _sum(step[k] * gains[_without(subset, k)] for k in subset)
    return gains[subset] / (lifts[subset] * (1 + rate))


def _subsets(keep: int) -> Iterator[Subset]:
    """Return the non-empty subsets of range(keep), small subsets first, the whole set last."""
    return chain.from_iterable(combinations(range(keep), size) for size in range(1, keep + 1))


def _without(subset: Subset, k: int) -> Subset:
    return tuple(i for i in subset if i != k)


def _step(rate: Tensor, subset: Subset) -> Tensor:
    """Return (1 + y_k) / (1 + Y_B) for every k, [keep, n]; only the rows of k in B are meaningful."""
    return (1 + rate) / (1 + _sum(rate[k] for k in subset))


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)
