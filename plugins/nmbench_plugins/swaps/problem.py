"""The objective of swaps in one layer: e H e^T + 2 l e^T, summed over rows; see `refiner`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import nmbench

EPSILON = torch.finfo(torch.float32).eps
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Problem:
    """Rows of a layer, columns first and scaled so that nothing overflows; float32.

    `gram` `[in, in]`, H; `others` `[in, in]`, H with H_gg = 0 for every group g; `weight` `[in, out]`; `linear`
    `[in, out]`, the transpose of l; `noise` `[in, out]`, a bound of the rounding in the part of a weight in the error;
    `scale` `[out]`, the divisors of the rows, relative to the largest divisor.
    """

    gram: Tensor
    others: Tensor
    weight: Tensor
    linear: Tensor
    noise: Tensor
    scale: Tensor
    pattern: nmbench.Pattern

    @classmethod
    def of(
        cls, weight: Tensor, gram: Tensor, drift: Tensor | None, lag: Tensor | None, pattern: nmbench.Pattern
    ) -> Problem:
        """Return the problem of a layer with `weight` `[out, in]`.

        `gram`: H `[in, in]`. `drift` `[in, in]`: times w one part of l; `lag` `[out, in]`: the other part of l.
        """
        rows = weight.float()
        largest = gram.diagonal().amax().clamp_min(TINY)
        gram = gram / largest
        scale = rows.abs().amax(dim=1)  # [out]
        if lag is not None:
            lag = lag / largest
            scale = scale.maximum(lag.abs().amax(dim=1))  # a row of zeros may have as large a lag as any other row
        scale = scale.clamp_min(TINY)
        rows = rows / scale[:, None]
        others = gram.clone()
        own_blocks(others, pattern.group).zero_()
        linear = torch.zeros_like(rows) if drift is None else rows @ (drift / largest)
        if lag is not None:
            linear = linear + lag / scale[:, None]
        reach = rows.abs() * gram.diagonal().sqrt()  # [out, in]
        noise = EPSILON * (reach * reach.sum(dim=1, keepdim=True) + (rows * linear).abs()) + TINY
        columns, linear, noise = (tensor.t().contiguous() for tensor in (rows, linear, noise))
        return cls(gram, others, columns, linear, noise, scale / scale.amax(), pattern)

    def rows(self, index: Tensor) -> Problem:
        """Return the problem of some of the rows; `index` int64."""
        weight, linear, noise = (tensor.index_select(1, index) for tensor in (self.weight, self.linear, self.noise))
        return Problem(self.gram, self.others, weight, linear, noise, self.scale[index], self.pattern)

    def pruned_error(self, dropped: Tensor) -> Tensor:
        """Return the sum over rows of e H e^T; `dropped` float `[in, out]`, 1 where a weight is dropped."""
        e = self.weight * dropped
        return ((e * (self.gram @ e)).sum(dim=0) * self.scale.square()).sum()

    def error(self, dropped: Tensor) -> Tensor:
        """Return the sum over rows of e H e^T + 2 l e^T."""
        linear = (2 * self.weight * dropped * self.linear).sum(dim=0)
        return self.pruned_error(dropped) + (linear * self.scale.square()).sum()


def own_blocks(gram: Tensor, group: int) -> Tensor:
    """Return a view `[group, group, groups]` of the blocks H_gg."""
    groups = len(gram) // group
    return gram.view(groups, group, groups, group).diagonal(dim1=0, dim2=2)
