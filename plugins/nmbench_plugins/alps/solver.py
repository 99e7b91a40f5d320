"""ALPS as a solver: the options and the order of the steps.

The layer becomes a problem of unit diagonal (`problem`), a search by ADMM finds the mask (`admm`), and conjugate
gradients on the kept weights lower the error under that mask (`nmbench.pruning.conjugate_gradients`). The defaults are
those of the paper. Preset `half-way` aims between the pruned and the dense model: on the selection plays of the demo at
2:4, seed 1, it has a perplexity of 56.4, against 63.8 by the defaults and 63.5 by `sequential` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import nmbench

if TYPE_CHECKING:
    from torch import Tensor

    from nmbench_plugins.alps.admm import Found
    from nmbench_plugins.alps.problem import Problem

HIGHEST_DAMPING = 1.0
TOLERANCE = 1e-4  # of the gradients in the repair, relative to those at its start


@dataclass(frozen=True)
class ALPS(nmbench.Solver):
    """Search for mask and weights together by ADMM on the layer's outputs, then repair the weights (float32)."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"half-way": {"dense_weight": 0.5, "sequential": True}}

    damping: float = nmbench.option(0.01, "added to the diagonal of the Gram matrix, relative to its mean")
    penalty: float = nmbench.option(0.1, "first weight of the distance between the weights and their N:M projection")
    iterations: int = nmbench.option(300, "most iterations of the search; it ends earlier when the mask is settled")
    repair_steps: int = nmbench.option(10, "most conjugate-gradient steps of the kept weights under the final mask")
    dense_weight: float = nmbench.option(
        0.0, "aim at the layer's outputs on pruned inputs (0), as the paper does, in the dense model (1), or between"
    )
    sequential: bool = nmbench.option(
        False, "true-sequential: gather the inputs of a layer after the layers before it in its block are pruned"
    )

    def __post_init__(self) -> None:
        if self.damping < 0 or self.penalty <= 0 or self.iterations < 1 or self.repair_steps < 0:
            raise nmbench.NMBenchError("alps needs damping >= 0, penalty > 0, iterations >= 1 and repair_steps >= 0.")
        if not 0 <= self.dense_weight <= 1:
            raise nmbench.NMBenchError(f"alps needs dense_weight from 0 to 1, not {self.dense_weight:g}.")

    @property
    def needs(self) -> nmbench.Stat:
        """The Gram matrix, and the drift of the inputs where the target is not that of the pruned inputs."""
        return nmbench.Stat.GRAM | (nmbench.Stat.DRIFT if self.dense_weight else nmbench.Stat.NONE)

    def solve(self, weight: Tensor, stats: nmbench.LayerStats, pattern: nmbench.Pattern) -> nmbench.Pruned:
        from nmbench.pruning import conjugate_gradients

        assert stats.gram is not None
        drift = None
        if self.dense_weight:
            assert stats.drift is not None
            drift = self.dense_weight * stats.drift
        problem, found, damping = self.searched(weight, stats.gram, drift, pattern)
        repaired = conjugate_gradients(
            found.weight, found.mask, problem.gram, problem.linear(), self.repair_steps, TOLERANCE
        ).div_(problem.scale)
        note = f"damping raised from {self.damping:g} to {damping:g}" if damping != self.damping else ""
        figures = {"iterations": float(found.iterations)}
        return nmbench.Pruned(found.mask, repaired.to(weight.dtype) + 0.0, note, figures)

    def searched(
        self, weight: Tensor, gram: Tensor, drift: Tensor | None, pattern: nmbench.Pattern
    ) -> tuple[Problem, Found, float]:
        """Return the problem, what the search found, and the damping, raised tenfold where a factor failed.

        Raises `NumericalFailure` beyond `HIGHEST_DAMPING`.
        """
        from nmbench_plugins.alps.admm import search
        from nmbench_plugins.alps.problem import Problem

        damping = self.damping
        while True:
            problem = Problem.of(weight, gram, damping, drift)
            found = search(problem, pattern, self.penalty, self.iterations)
            if found is not None:
                return problem, found, damping
            if damping >= HIGHEST_DAMPING:
                raise nmbench.NumericalFailure(f"the Gram matrix has no Cholesky factor even with damping {damping:g}.")
            damping = min(max(10 * damping, 0.01), HIGHEST_DAMPING)
