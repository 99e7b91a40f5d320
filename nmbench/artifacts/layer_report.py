"""The report of one layer: counts over its groups, and the first problem found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from nmbench.artifacts.artifact import Matrix
from nmbench.artifacts.group_counts import Array, Counts, count, nonzeros
from nmbench.pattern import Pattern


@dataclass(frozen=True)
class LayerReport:
    """Counts over one layer. `problem` is empty if the layer is strict.

    `first` is row, column and number of kept weights of the first broken group. `fewer` counts the groups with less
    than N non-zeros, `extra_zeros` the zeros among weights that the pattern, or the mask, keeps, `off_mask` the
    non-zeros off the mask.
    """

    name: str
    shape: tuple[int, int]
    pattern: str | None
    problem: str = ""
    groups: int = 0
    broken: int = 0
    first: tuple[int, int, int] | None = None
    fewer: int = 0
    extra_zeros: int = 0
    negative_zeros: int = 0
    off_mask: int = 0
    flat: bool = False

    @property
    def strict(self) -> bool:
        return not self.problem

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


def layer_report(
    name: str, mask: Matrix | None, weight: Matrix | None, pattern: Pattern | None, at_most: bool = False
) -> LayerReport:
    """The report of one layer from its mask, its weight or both. A layer without a pattern has that as its problem.

    A mask keeps exactly N of every group, or `at_most` N if it is the non-zeros of weights.
    """
    matrix = mask or weight
    assert matrix is not None
    report = LayerReport(name, matrix.shape, str(pattern) if pattern else None, flat=matrix.flat)
    if pattern is None:
        return replace(report, problem="shows no N:M pattern with M up to 32")
    if not pattern.divides(matrix.shape[1]):
        return replace(report, problem=f"rows of {matrix.shape[1]} do not fall into groups of {pattern.group}")
    if mask and weight and mask.shape != weight.shape:
        return replace(report, problem=f"has a mask of shape {mask.shape}, but weights {weight.shape}")
    total = Tally()
    exact = mask is not None and not at_most
    for tally in tallies(mask, weight, pattern, exact):
        total = total.plus(tally)
    return replace(
        report,
        problem=problem_of(total, pattern, exact),
        groups=total.counts.groups,
        broken=total.counts.broken,
        first=total.counts.first,
        fewer=total.counts.fewer,
        extra_zeros=total.extra_zeros,
        negative_zeros=total.negative_zeros,
        off_mask=total.off_mask,
    )


@dataclass(frozen=True)
class Tally:
    """The counts of a slice, or of all slices so far."""

    counts: Counts = field(default_factory=Counts)
    extra_zeros: int = 0
    negative_zeros: int = 0
    off_mask: int = 0
    finite: bool = True

    def plus(self, other: Tally) -> Tally:
        return Tally(
            self.counts.plus(other.counts),
            self.extra_zeros + other.extra_zeros,
            self.negative_zeros + other.negative_zeros,
            self.off_mask + other.off_mask,
            self.finite and other.finite,
        )


def tallies(mask: Matrix | None, weight: Matrix | None, pattern: Pattern, exact: bool) -> Iterator[Tally]:
    """The tally of every slice of a mask, of a weight, or of both side by side."""
    group = pattern.group
    if mask and weight:
        for (row, column, kept), (_, _, part) in zip(mask.slices(group), weight.slices(group), strict=True):
            yield tally_both(kept.numpy(), part, count(kept.numpy(), pattern, exact, row, column), pattern)
    elif mask:
        for row, column, kept in mask.slices(group):
            yield Tally(count(kept.numpy(), pattern, exact, row, column))
    elif weight:
        for row, column, part in weight.slices(group):
            found = nonzeros(part)
            counts = count(found.kept, pattern, exact, row, column)
            yield Tally(counts, counts.missing, found.negative_zeros, 0, found.finite)


def tally_both(kept: Array, part: Tensor, counts: Counts, pattern: Pattern) -> Tally:
    """The tally of a slice of weights under a mask: kept zeros, and non-zeros off the mask."""
    found = nonzeros(part)
    off_mask = int(np.count_nonzero(found.kept & ~kept))
    extra_zeros = int(np.count_nonzero(kept)) - (int(np.count_nonzero(found.kept)) - off_mask)
    if extra_zeros:  # the rare case: a mask that is strict over weights that have fewer non-zeros
        counts = replace(counts, fewer=count(found.kept & kept, pattern, False).fewer)
    return Tally(counts, extra_zeros, found.negative_zeros, off_mask, found.finite)


def problem_of(total: Tally, pattern: Pattern, exact: bool) -> str:
    """The first problem of a layer in a few words, empty if the layer is strict."""
    counts = total.counts
    if counts.first:
        row, column, kept = counts.first
        wanted = f"instead of {pattern.keep}" if exact else f"instead of at most {pattern.keep}"
        if kept == pattern.keep or (not exact and kept < pattern.keep):
            wanted = f"not in {pattern.units.keep} whole units of {pattern.unit}"
        return (
            f"{counts.broken} of {counts.groups} groups are not {pattern}; first: row {row}, columns "
            f"{column}..{column + pattern.group - 1} keep {kept} {wanted}"
        )
    if total.off_mask:
        return f"{total.off_mask} weights off the mask are not zero"
    return "" if total.finite else "holds NaN or infinite weights"
