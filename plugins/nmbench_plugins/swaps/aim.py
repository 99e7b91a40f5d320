"""The target of a layer's outputs when weights are dropped; `refiner` states the formulas."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import nmbench

if TYPE_CHECKING:
    from torch import Tensor


class Aim(NamedTuple):
    """The numbers a and b of a target.

    `dense`, a: from the layer's outputs on pruned inputs (0) to its outputs in the dense model (1). `residual`, b: the
    share of the error in the residual stream that a layer compensates for, in layers that write into that stream.
    """

    dense: float
    residual: float

    def __str__(self) -> str:
        return f"{self.dense:g}/{self.residual:g}"

    @property
    def needs(self) -> nmbench.Stat:
        needs = nmbench.Stat.GRAM
        if self.dense or self.residual:
            needs |= nmbench.Stat.DRIFT
        if self.residual:
            needs |= nmbench.Stat.LAG
        return needs

    def target(self, stats: nmbench.LayerStats) -> tuple[Tensor | None, Tensor | None]:
        """Return (a - b) D and b L; a D and None for a layer that does not write into the residual stream."""
        lag = None if stats.lag is None or not self.residual else self.residual * stats.lag
        share = self.dense - (0 if lag is None else self.residual)
        if not share:
            return None, lag
        assert stats.drift is not None
        return share * stats.drift, lag

    def linear(self, moved: Tensor, lag: Tensor | None) -> Tensor:
        """Return l `[out, in]` from W D, `moved`, and L, `lag`."""
        if lag is None:
            return self.dense * moved
        return (self.dense - self.residual) * moved + self.residual * lag

    @classmethod
    def parsed(cls, text: str) -> list[Aim]:
        """Return the aims in a text like `0/0, 0.15/0.15`. Raises `ValueError` for other texts and repeated aims."""
        aims = []
        for part in text.split(","):
            dense, residual = part.split("/")
            aims.append(cls(float(dense), float(residual)))
        if len(set(aims)) < len(aims) or not all(-2 <= number <= 2 for aim in aims for number in aim):
            raise ValueError
        return aims
