"""Fast counts of non-zeros by group: on the bits of the weights, in numpy, a slice at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nmbench.pattern import Pattern

Array = np.ndarray[Any, Any]
UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}  # a group of that many bools, read as one number
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
INFINITIES = {  # the bits of +inf: as integers, finite numbers are below and NaNs above
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F800000,
    torch.float64: 0x7FF0000000000000,
}


@dataclass(frozen=True)
class Nonzeros:
    """The non-zeros of a weight, bool `[rows, in]`; its number of negative zeros; True if all entries are finite."""

    kept: Array
    negative_zeros: int
    finite: bool


def nonzeros(weight: Tensor) -> Nonzeros:
    """The non-zeros of `weight` `[rows, in]`, read once. NaN counts as a non-zero."""
    if weight.dtype == torch.bool:
        return Nonzeros(weight.numpy(), 0, True)
    if not weight.is_floating_point():
        return Nonzeros(weight.numpy() != 0, 0, True)
    if weight.element_size() == 1:
        weight = weight.float()  # float8: torch supports few operations
    bits = weight.contiguous().view(INTEGERS[weight.element_size()]).numpy()
    size = bits & np.iinfo(bits.dtype).max  # all but the sign
    kept = size != 0
    negative = np.count_nonzero(bits) - np.count_nonzero(kept)
    return Nonzeros(kept, int(negative), bool(size.max() < INFINITIES[weight.dtype]))


def group_counts(kept: Array, group: int) -> Array:
    """The number of True among every `group` consecutive entries: bool `[rows, in]` -> `[rows, in / group]`."""
    kept = np.ascontiguousarray(kept)
    rows, columns = kept.shape
    if group in UNSIGNED:
        dtype = UNSIGNED[group]
        ones = dtype(int("01" * group, 16))
        packed = kept.view(dtype)  # [rows, in / group]; times 0x0101... adds the bytes up into the highest one
        return (packed * ones) >> dtype(8 * (group - 1))
    parts = kept.view(np.uint8).reshape(rows, columns // group, group)  # [rows, in / group, group]
    counts = parts[..., 0].astype(np.uint8 if group < 256 else np.uint16)
    for entry in range(1, group):
        np.add(counts, parts[..., entry], out=counts)
    return counts


def touched(kept: Array, unit: int) -> Array:
    """The smallest mask of whole units that contains `kept`: bool `[rows, in]` -> bool `[rows, in]`."""
    units = np.asarray(kept.reshape(len(kept), -1, unit).any(axis=2))  # [rows, in / unit]
    return units.repeat(unit, axis=1)


@dataclass(frozen=True)
class Counts:
    """Counts of groups in a slice or a whole matrix; `count` defines them.

    `first` is row, column and number of kept weights of the first broken group.
    """

    groups: int = 0
    broken: int = 0
    fewer: int = 0
    missing: int = 0
    first: tuple[int, int, int] | None = None

    def plus(self, other: Counts) -> Counts:
        return Counts(
            self.groups + other.groups,
            self.broken + other.broken,
            self.fewer + other.fewer,
            self.missing + other.missing,
            self.first or other.first,
        )


def count(kept: Array, pattern: Pattern, exact: bool, row: int = 0, column: int = 0) -> Counts:
    """Count the groups of `kept` `[rows, in]`; its first entry is at `row` and `column` of the matrix.

    A group is broken if it keeps more than `pattern.keep` or, with `exact`, any other number. `fewer` counts the groups
    that keep less than `pattern.keep`, `missing` the weights that those groups lack in total. Where the pattern has
    units of several weights, a unit of which one weight is kept counts as kept; with `exact` it has to be kept whole.
    """
    counts = group_counts(kept, pattern.group)
    whole = counts if pattern.unit == 1 else group_counts(touched(kept, pattern.unit), pattern.group)
    kinds = (counts,) if pattern.unit == 1 else (counts, whole)
    if not any(np.count_nonzero(found != pattern.keep) for found in kinds):
        return Counts(counts.size)  # the usual case, and the only one that has to be fast
    short = counts < pattern.keep
    wrong = (counts != pattern.keep) | (whole != pattern.keep) if exact else whole > pattern.keep
    broken, fewer = int(np.count_nonzero(wrong)), int(np.count_nonzero(short))
    first = None
    if broken:
        at = divmod(int(wrong.argmax()), wrong.shape[1])
        first = (row + at[0], column + at[1] * pattern.group, int(counts[at]))
    return Counts(counts.size, broken, fewer, fewer * pattern.keep - int(counts[short].sum()), first)
