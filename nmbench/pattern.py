"""N:M patterns. `Pattern.groups` cuts a weight matrix into groups.

A pattern N:M keeps N of every M consecutive entries along the input (last) dimension; a group never straddles rows.
N is the number that is KEPT: 1:4 leaves 75 % zeros.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nmbench.errors import NMBenchError, NumericalFailure

if TYPE_CHECKING:
    from torch import Tensor

PAIRWISE = 32  # largest group for which comparing all pairs was faster than sorting, on a CPU
PAIRS_AT_ONCE = 2**24  # pairs of entries that a GPU compares in one kernel: up to here launches cost more


@dataclass(frozen=True, order=True)
class Pattern:
    """Keep `keep` of every `group` consecutive weights of a row. Raises `NMBenchError` unless 1 <= keep < group."""

    keep: int
    group: int

    def __post_init__(self) -> None:
        if not 1 <= self.keep < self.group:
            raise NMBenchError(
                f"pattern {self} is impossible: N:M keeps N of M consecutive weights, so 1 <= N < M, for example 2:4."
            )

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Return the pattern written as "2:4". Raises `NMBenchError` with the expected form."""
        match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text.strip())
        if match is None:
            raise NMBenchError(
                f"pattern {text!r} is not of the form N:M (keep N of every M consecutive weights), for example 2:4."
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"

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

    def top(self, score: Tensor) -> Tensor:
        """Return the bool mask of the `keep` highest scores of every group; of equal scores the lower index is kept.

        `score` is `[..., in]` of any real dtype, compared without a cast; the mask has this shape and exactly `keep`
        True in every group. Raises `NumericalFailure` if a score is NaN or infinite.
        """
        if not score.isfinite().all():
            raise not_finite(score)
        return self.top_of_finite(score)

    def top_of_finite(self, score: Tensor) -> Tensor:
        """Return `top` without the check for NaN and infinity; of such scores the mask need not be strict."""
        groups = self.groups(score)
        if score.is_cuda and score.numel() * self.group <= PAIRS_AT_ONCE:
            rank = ranks_at_once(groups)
        else:
            rank = ranks_by_pairs(groups) if self.group <= PAIRWISE else ranks_by_sorting(groups)
        return (rank < self.keep).reshape(score.shape).contiguous()

    def kept(self, mask: Tensor) -> Tensor:
        """Count the kept entries of every group: bool `[..., in]` -> int64 `[..., in/group]`."""
        return self.groups(mask).sum(dim=-1)


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
