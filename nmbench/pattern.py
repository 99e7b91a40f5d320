"""N:M patterns. `Pattern.groups` cuts a weight matrix into groups.

A pattern N:M keeps N of every M consecutive entries along the input (last) dimension; a group never straddles rows.
N is the number that is KEPT: 1:4 leaves 75 % zeros.

A pattern N:MxU keeps N of every M consecutive units. A unit is U consecutive weights, all kept or all pruned: 2:4x2
keeps 2 of every 4 pairs, which is 4 of 8 weights. Every N:MxU mask is also an (N U):(M U) mask.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nmbench.errors import NMBenchError, NumericalFailure

if TYPE_CHECKING:
    from torch import Tensor

PAIRWISE = 32  # largest group for which comparing all pairs was faster than sorting, on a CPU
SORTED_GROUPS = 512  # so many groups were sorted faster than all their pairs were compared, on a CPU
PAIRS_AT_ONCE = 2**24  # pairs of entries that a GPU compares in one kernel: up to here launches cost more


@dataclass(frozen=True, order=True)
class Pattern:
    """Keep `keep` of every `group` consecutive weights of a row, in whole units of `unit` weights.

    `keep` and `group` count weights, whatever the unit: 2:4x2 has keep 4, group 8 and unit 2. Raises `NMBenchError`
    unless 1 <= keep < group and both are multiples of the unit.
    """

    keep: int
    group: int
    unit: int = 1

    def __post_init__(self) -> None:
        if self.unit < 1 or self.keep % self.unit or self.group % self.unit:
            raise NMBenchError(
                f"a pattern cannot keep {self.keep} of {self.group} weights in units of {self.unit}: keep and group "
                "are multiples of a unit of at least 1 weight, for example keep 4, group 8, unit 2 for 2:4x2."
            )
        if not 1 <= self.keep < self.group:
            things = "weights" if self.unit == 1 else f"units of {self.unit} weights"
            raise NMBenchError(
                f"pattern {self} is impossible: N:M keeps N of M consecutive {things}, so 1 <= N < M, for example 2:4."
            )

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Return the pattern written as "2:4" or "2:4x2". Raises `NMBenchError` with the expected form."""
        match = re.fullmatch(r"(\d{1,4}):(\d{1,4})(?:x([1-9]\d{0,3}))?", text.strip())
        if match is None:
            raise NMBenchError(
                f"pattern {text!r} is not of the form N:M (keep N of every M consecutive weights) or N:MxU (of every M "
                f"units of U weights), for example 2:4 or 2:4x2."
            )
        unit = int(match[3] or 1)
        return cls(unit * int(match[1]), unit * int(match[2]), unit)

    def __str__(self) -> str:
        size = f"x{self.unit}" if self.unit > 1 else ""
        return f"{self.keep // self.unit}:{self.group // self.unit}{size}"

    @property
    def units(self) -> Pattern:
        """N:M counted in units: 2:4 for 2:4x2; the pattern itself if a unit is one weight."""
        return Pattern(self.keep // self.unit, self.group // self.unit)

    @property
    def density(self) -> float:
        """The share of kept weights."""
        return self.keep / self.group

    def divides(self, inputs: int) -> bool:
        """True if rows of `inputs` weights fall into whole groups."""
        return inputs % self.group == 0

    def groups(self, tensor: Tensor) -> Tensor:
        """View `[..., in]` as `[..., in/group, group]`. Raises `NMBenchError` if M does not divide the row."""
        inputs = tensor.shape[-1]
        if not self.divides(inputs):
            raise NMBenchError(f"rows of {inputs} weights do not fall into groups of {self.group} (pattern {self}).")
        return tensor.reshape(*tensor.shape[:-1], inputs // self.group, self.group)  # [..., in/group, group]

    def by_unit(self, tensor: Tensor) -> Tensor:
        """View `[..., in]` as `[..., in/unit, unit]`. Raises `NMBenchError` as `groups` does."""
        return self.groups(tensor).reshape(*tensor.shape[:-1], -1, self.unit)  # [..., in/unit, unit]

    def whole(self, units: Tensor) -> Tensor:
        """Return `[..., in/unit]`, one entry for each unit, with the entry at every weight: `[..., in]`."""
        return units.repeat_interleave(self.unit, dim=-1) if self.unit > 1 else units

    def top(self, score: Tensor, unit_power: int = 1) -> Tensor:
        """Return the bool mask of the `keep` highest scores of every group; of equal scores the lower index is kept.

        `score` is `[..., in]` of any real dtype, compared without a cast; the mask has this shape and exactly `keep`
        True in every group. A unit of several weights scores the sum of their scores to the `unit_power`, which is 2
        for the roots of what adds up, such as the sizes of weights; it is not used if a unit is one weight. Raises
        `NumericalFailure` if a score is NaN or infinite.
        """
        if not all_finite(score):
            raise not_finite(score)
        return self.top_of_finite(score, unit_power)

    def top_of_finite(self, score: Tensor, unit_power: int = 1) -> Tensor:
        """Return `top` without the check for NaN and infinity; of such scores the mask need not be strict."""
        if self.unit > 1:
            return self.whole(self.units.top_of_finite(self.unit_scores(score, unit_power)))
        groups = self.groups(score)
        if score.is_cuda and score.numel() * self.group <= PAIRS_AT_ONCE:
            rank = ranks_at_once(groups)
        elif self.group > PAIRWISE or score.numel() <= SORTED_GROUPS * self.group:
            rank = ranks_by_sorting(groups)
        else:
            rank = ranks_by_pairs(groups)
        return (rank < self.keep).reshape(score.shape).contiguous()

    def unit_scores(self, score: Tensor, power: int = 1) -> Tensor:
        """Return the sums of `score` to the `power` over units: `[..., in]` -> `[..., in/unit]`.

        Sums are float64, of integers and bools int64: squares of float32 neither overflow nor vanish.
        """
        import torch

        wide = self.by_unit(score).to(torch.float64 if score.is_floating_point() else torch.int64)
        return (wide.pow(power) if power != 1 else wide).sum(dim=-1)

    def kept(self, mask: Tensor) -> Tensor:
        """Count the kept entries of every group: bool `[..., in]` -> int64 `[..., in/group]`."""
        return self.groups(mask).sum(dim=-1)

    def touched(self, mask: Tensor) -> Tensor:
        """Return the smallest mask of whole units that contains `mask`: bool `[..., in]` -> bool `[..., in]`."""
        return self.whole(self.by_unit(mask).any(dim=-1))

    def broken(self, mask: Tensor) -> Tensor:
        """Return where bool `mask` `[..., in]` is not strict: True for a group that does not keep exactly N units."""
        wrong = self.kept(mask) != self.keep
        return wrong if self.unit == 1 else wrong | (self.kept(self.touched(mask)) != self.keep)


def all_finite(values: Tensor) -> bool:
    """Return True if no value is NaN or infinite. Contiguous values are not copied, as by `isfinite`."""
    if values.is_complex():
        return bool(values.isfinite().all())
    if not values.is_floating_point() or not values.numel():
        return True
    if values.element_size() == 1:
        values = values.half()  # exact
    low, high = values.aminmax()  # NaN if one of the values is
    return bool(low.isfinite() & high.isfinite())


def not_finite(score: Tensor) -> NumericalFailure:
    """Return the error that names the first score that is NaN or infinite."""
    where = tuple(score.isfinite().logical_not().nonzero()[0].tolist())
    return NumericalFailure(f"score at {where} is {score[where].item()}; scores must be finite.")


def ranks_by_sorting(groups: Tensor) -> Tensor:
    """Return the rank of each entry in its group `[..., group]`: how many are higher, or equal and on its left."""
    # torch.topk promises no order among equal scores; a stable sort does.
    order = groups.sort(dim=-1, descending=True, stable=True).indices
    return order.argsort(dim=-1)  # the inverse permutation


def ranks_by_pairs(groups: Tensor) -> Tensor:
    """Return the same ranks as int8, one distance between entries at a time: 7 times faster than sorting at 2:4."""
    import torch

    columns = groups.movedim(-1, 0).contiguous()  # [group, ...]
    rank = torch.zeros_like(columns, dtype=torch.int8)
    for distance in range(1, len(columns)):
        left_first = columns[:-distance] >= columns[distance:]
        rank[distance:] += left_first
        rank[:-distance] += left_first.logical_not_()
    return rank.movedim(0, -1)


def ranks_at_once(groups: Tensor) -> Tensor:
    """Return the same ranks as int64, all pairs in one comparison: few kernel launches."""
    import torch

    own, others = groups.unsqueeze(-1), groups.unsqueeze(-2)  # [..., group, group]
    left = torch.ones(groups.shape[-1], groups.shape[-1], dtype=torch.bool, device=groups.device).tril(-1)
    return ((others > own) | ((others == own) & left)).sum(dim=-1)
