"""Least squares: the kept weights of each layer that bring its outputs closest to a target, whatever the mask.

For one output row let w be the dense weights, v the kept ones, X the inputs of the layer in the pruned model and Y
those in the dense model; H = X^T X, D = (Y - X)^T X. The target of the outputs lies between X w (a = 0) and Y w
(a = 1). A layer that writes into the residual stream r, which is q in the dense model, may compensate for b (q - r):

    |X v - X w - a (Y - X) w - b (q - r)|^2  =  v H v^T - 2 c v^T + const,    c = w H + (a - b) w D + b L,

with L, the row of `LayerStats.lag`, as in the refiner `swaps`; for other layers c = w H + a w D. The minimum is found
exactly, row by row, or by conjugate gradients. A few steps of these stay near the start, which guards against fitting
the calibration text where a layer has more inputs than independent tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import nmbench

if TYPE_CHECKING:
    from torch import Tensor

SOLVERS = ("cg", "exact")


@dataclass(frozen=True)
class LeastSquares(nmbench.LayerRepair):
    """Least squares: the kept weights of each layer that bring its outputs closest to a target."""

    dense_weight: float = nmbench.option(
        0.3,
        "aim at the layer's outputs on pruned inputs (0), in the dense model (1), or between; try several: of those "
        "tried, 0.15 to 0.3 was best for SmolLM2-135M (30 blocks), 0.6 to 1 for the demo (4), with residual_weight",
    )
    residual_weight: float = nmbench.option(
        0.3,
        "aim at compensating none (0) to all (1) of the error in the residual stream that the layer writes into; see "
        "dense_weight",
    )
    solver: str = nmbench.option(
        "cg", "conjugate gradients from the start, or the exact minimum of every row", choices=SOLVERS
    )
    iterations: int = nmbench.option(30, "most steps of conjugate gradients", unit="steps")
    damping: float = nmbench.option(0.0, "pull towards the start, relative to the mean of the diagonal of H")
    skip_tokens: int = nmbench.option(1, "first tokens of every window that are left out of the statistics")
    sequential: bool = nmbench.option(
        True, "gather the inputs of a layer after the layers before it in its block are repaired"
    )

    def __post_init__(self) -> None:
        weights = self.dense_weight, self.residual_weight
        if self.iterations < 0 or self.damping < 0 or self.skip_tokens < 0 or not all(0 <= w <= 1 for w in weights):
            raise nmbench.NMBenchError(
                "least-squares needs iterations, damping and skip_tokens >= 0, and dense_weight and residual_weight "
                "from 0 to 1."
            )

    @property
    def needs(self) -> nmbench.Stat:
        """The Gram matrix, and the sums beside the dense model where the target asks for them."""
        needs = nmbench.Stat.GRAM
        if self.dense_weight or self.residual_weight:
            needs |= nmbench.Stat.DRIFT
        return needs | nmbench.Stat.LAG if self.residual_weight else needs

    def repair(
        self, weight: Tensor, stats: nmbench.LayerStats, start: nmbench.Pruned, pattern: nmbench.Pattern
    ) -> nmbench.Pruned:
        """Return the mask of the start with the weights at the minimum."""
        from nmbench.pruning import better_rows, conjugate_gradients
        from nmbench_plugins.leastsquares.solver import exact

        assert stats.gram is not None and start.weight is not None
        gram, linear, before = stats.gram, self.linear(weight.float(), stats), start.weight.float()
        note = ""
        if self.solver == "exact":
            found, used = exact(before, start.mask, gram, linear, self.damping)
            note = f"damping raised from {self.damping:g} to {used:g}" if used != self.damping else ""
        else:
            found = conjugate_gradients(before, start.mask, gram, linear, self.iterations, 0.0, self.damping)
        rounded = better_rows(before, found.to(weight.dtype).float(), gram, linear)  # rounding may undo a small fall
        return nmbench.Pruned(start.mask, rounded.to(weight.dtype) + 0.0, note)

    def linear(self, dense: Tensor, stats: nmbench.LayerStats) -> Tensor:
        """Return c of every row, `[out, in]` float32, from the dense weights `[out, in]`."""
        assert stats.gram is not None
        linear, share = dense @ stats.gram, self.dense_weight
        if self.residual_weight and stats.lag is not None:
            linear.add_(stats.lag, alpha=self.residual_weight)
            share -= self.residual_weight
        if share:
            assert stats.drift is not None
            linear.addmm_(dense, stats.drift, alpha=share)
        return linear
