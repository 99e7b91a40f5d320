"""Strict N:M weights in packed form: the values of the kept weights, and a code of few bits for each group.

A code says which members of a group are kept, in one of two codings, whichever is smaller:

- indices: the index of each kept weight in ascending order, `ceil(log2 M)` bits each. 2:4 has 2 bits a value, 4 bits a
  group, as on sparse tensor cores. Used if `N ceil(log2 M) <= M`: 2:4 and every sparser pattern such as 1:4 and 2:8.
- places: one bit for each member, 1 = kept; M bits a group. Used for 4:8, 8:16, 4:6, 6:8 and every denser pattern.

A rank among all `C(M, N)` subsets would take `ceil(log2 C(M, N))` bits: 1 bit fewer for 2:4 and 4:8, 2 bits fewer for
8:16, which is 1 to 3 % of a 16-bit weight. It needs a table in the inner loop of a product; indices and places need
shifts. Codes of a row are packed without gaps between groups, lowest bit first; each row begins at a whole byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nmbench.errors import NotStrict
from nmbench.pattern import Pattern
from nmbench.runtime.packed.bits import packed_bits, unpacked_bits

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PART = 2**22  # weights packed at once, so that packing a large matrix takes little memory beside it


@dataclass(frozen=True)
class PackedWeight:
    """A weight `[out, in]` without the weights that `pattern` drops.

    values: `[out, groups * N]` of any dtype, the kept weights of every row from left to right. codes: uint8
    `[out, ceil(groups * bits / 8)]`. `inputs` is the length of a row; its last group may be shorter than M, and then
    holds zeros beyond the end of the row.
    """

    values: Tensor
    codes: Tensor
    pattern: Pattern
    inputs: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the unpacked weight."""
        return self.values.shape[0], self.inputs

    @property
    def groups(self) -> int:
        """Groups in a row."""
        return groups_of(self.inputs, self.pattern)

    @property
    def bytes(self) -> int:
        """Bytes of values and codes."""
        return self.values.nbytes + self.codes.nbytes

    @property
    def dense_bytes(self) -> int:
        """Bytes of the unpacked weight."""
        return self.shape[0] * self.inputs * self.values.element_size()

    def to(self, device: torch.device | str) -> PackedWeight:
        """Return the same weight on another device."""
        return PackedWeight(self.values.to(device), self.codes.to(device), self.pattern, self.inputs)


def groups_of(inputs: int, pattern: Pattern) -> int:
    """Return the number of groups in a row, the shorter one at its end included."""
    return -(-inputs // pattern.group)


def index_bits(pattern: Pattern) -> int:
    """Return the bits of an index within a group, `ceil(log2 M)`."""
    return (pattern.group - 1).bit_length()


def by_index(pattern: Pattern) -> bool:
    """Return whether the code of a group is made of indices; else it is made of places."""
    return pattern.keep * index_bits(pattern) <= pattern.group


def group_bits(pattern: Pattern) -> int:
    """Return the bits of the code of a group."""
    return min(pattern.keep * index_bits(pattern), pattern.group)


def code_bytes(inputs: int, pattern: Pattern) -> int:
    """Return the bytes of the codes of a row."""
    return -(-groups_of(inputs, pattern) * group_bits(pattern) // 8)


def packed_share(pattern: Pattern, value_bits: int = 16) -> float:
    """Return the bytes of a packed weight over those of the dense one, for long rows: 9/16 for 2:4 in 16 bits."""
    return (pattern.keep * value_bits + group_bits(pattern)) / (pattern.group * value_bits)


def pack(weight: Tensor, pattern: Pattern, mask: Tensor | None = None) -> PackedWeight:
    """Return `weight` `[out, in]` in packed form; `unpack` returns the same bits.

    `mask`, bool `[out, in]`, says which weights are kept. Without a mask, or in groups with fewer than N kept weights,
    zeros with the lowest indices are stored so that every group has N values. Raises `NotStrict` if a weight that is
    not kept is not +0.0, or a group has more than N other weights.
    """
    bits = weight.detach().contiguous().view(INTEGERS[weight.element_size()])
    negative = torch.iinfo(bits.dtype).min if weight.is_floating_point() and weight.element_size() > 1 else None
    step = max(1, PART // max(1, weight.shape[1]))
    parts = []
    for start in range(0, len(weight), step):
        rows = bits[start : start + step]
        scores = scores_of(rows, negative) if mask is None else mask[start : start + step].to(bits.device, torch.uint8)
        parts.append(packed_rows(rows, scores, pattern, start))
    values = torch.cat([values for values, _ in parts]).view(weight.dtype)
    return PackedWeight(values, torch.cat([codes for _, codes in parts]), pattern, weight.shape[1])


def scores_of(bits: Tensor, negative_zero: int | None) -> Tensor:
    """Return which entries must be stored, as uint8 like `bits`: 2 for other numbers, 1 for -0.0, 0 for zero."""
    scores = (bits != 0).to(torch.uint8) << 1
    return scores if negative_zero is None else scores - (bits == negative_zero).to(torch.uint8)


def packed_rows(bits: Tensor, scores: Tensor, pattern: Pattern, first: int) -> tuple[Tensor, Tensor]:
    """Return values and codes of a few rows, of which `first` is the number of the first one."""
    rows, inputs = bits.shape
    beyond = (0, -inputs % pattern.group)
    bits = F.pad(bits, beyond)
    kept = pattern.top_of_finite(F.pad(scores, beyond))  # [rows, groups * M]
    lost = (bits != 0) & ~kept
    if lost.any():
        row, column = lost.nonzero()[0].tolist()
        raise NotStrict(
            f"the weight is not {pattern}: row {first + row}, column {column} holds a number other than +0.0 that its "
            f"group does not keep; it was not packed."
        )
    return bits[kept].view(rows, -1), codes_of(kept, pattern)


def codes_of(kept: Tensor, pattern: Pattern) -> Tensor:
    """Return the codes of strict masks: bool `[rows, groups * M]` -> uint8 `[rows, bytes]`."""
    if not by_index(pattern):
        return packed_bits(kept)
    index = (kept.nonzero()[:, 1] % pattern.group).view(len(kept), -1, 1)  # [rows, groups * N, 1]
    powers = torch.arange(index_bits(pattern), device=kept.device)
    return packed_bits(((index >> powers) & 1).bool().flatten(1))


def indices_of(packed: PackedWeight) -> Tensor:
    """Return the column of every value, int64 `[out, groups * N]`, of a weight that is coded by indices."""
    pattern, width = packed.pattern, index_bits(packed.pattern)
    bits = unpacked_bits(packed.codes, packed.groups * pattern.keep * width).view(len(packed.codes), -1, width)
    powers = 1 << torch.arange(width, device=bits.device)
    index = (bits * powers).sum(dim=2).view(len(bits), -1, pattern.keep)  # [rows, groups, N]
    first = torch.arange(packed.groups, device=bits.device) * pattern.group
    return (index.clamp(max=pattern.group - 1) + first[:, None]).flatten(1)


def kept_of(packed: PackedWeight) -> Tensor:
    """Return the mask of a packed weight, bool `[out, groups * M]`: True for each stored value, beyond rows as well.

    Damaged codes may give masks that are not strict.
    """
    width = packed.groups * packed.pattern.group
    if not by_index(packed.pattern):
        return unpacked_bits(packed.codes, width)
    kept = torch.zeros(len(packed.codes), width, dtype=torch.bool, device=packed.codes.device)
    return kept.scatter_(1, indices_of(packed), True)


def unpack(packed: PackedWeight) -> Tensor:
    """Return the weight `[out, in]` with +0.0 where the pattern drops, the inverse of `pack`, bit for bit."""
    values = packed.values.view(INTEGERS[packed.values.element_size()])
    full = values.new_zeros(len(values), packed.groups * packed.pattern.group)
    if by_index(packed.pattern):
        full.scatter_(1, indices_of(packed), values)
    else:
        full.masked_scatter_(kept_of(packed), values)
    return full[:, : packed.inputs].contiguous().view(packed.values.dtype)
