"""ALPS as a solver: the options and the order of the steps.

The layer becomes a problem of unit diagonal (`problem`), a search by ADMM finds the mask (`admm`), and conjugate
gradients on the kept weights lower the error under that mask (`nmbench.pruning.conjugate_gradients`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

import nmbench
from nmbench.pruning import conjugate_gradients
from nmbench_plugins.alps.admm import Found, search
from nmbench_plugins.alps.problem import Problem

HIGHEST_DAMPING = 1.0
TOLERANCE = 1e-4  # of the gradients in the repair, relative to those at its start


@dataclass(frozen=True)
class ALPS(nmbench.Solver):
    """Search for mask and weights together by ADMM on the layer's outputs, then repair the weights (float32)."""

    needs = nmbench.Stat.GRAM

    damping: float = nmbench.option(0.01, "added to the diagonal of the Gram matrix, relative to its mean")
    penalty: float = nmbench.option(0.1, "first weight of the distance between the weights and their N:M projection")
    iterations: int = nmbench.option(300, "most iterations of the search; it ends earlier when the mask is settled")
    repair_steps: int = nmbench.option(10, "most conjugate-gradient steps of the kept weights under the final mask")
    sequential: bool = nmbench.option(
        False, "true-sequential: gather the inputs of a layer after the layers before it in its block are pruned"
    )

    def __post_init__(self) -> None:
        if self.damping < 0 or self.penalty <= 0 or self.iterations < 1 or self.repair_steps < 0:
            raise nmbench.NMBenchError("alps needs damping >= 0, penalty > 0, iterations >= 1 and repair_steps >= 0.")

    def solve(self, weight: Tensor, stats: nmbench.LayerStats, pattern: nmbench.Pattern) -> nmbench.Pruned:
        assert stats.gram is not None
        problem, found, damping = self.searched(weight, stats.gram, pattern)
        linear = problem.dense @ problem.gram
        repaired = conjugate_gradients(
            found.weight, found.mask, problem.gram, linear, self.repair_steps, TOLERANCE
        ).div_(problem.scale)
        note = f"damping raised from {self.damping:g} to {damping:g}" if damping != self.damping else ""
        figures = {"iterations": float(found.iterations)}
        return nmbench.Pruned(found.mask, repaired.to(weight.dtype) + 0.0, note, figures)

    def searched(self, weight: Tensor, gram: Tensor, pattern: nmbench.Pattern) -> tuple[Problem, Found, float]:
        """Return the problem, what the search found, and the damping, raised tenfold where a factor failed.

        Raises `NumericalFailure` beyond `HIGHEST_DAMPING`.
        """
        damping = self.damping
        while True:
            problem = Problem.of(weight, gram, damping)
            found = search(problem, pattern, self.penalty, self.iterations)
            if found is not None:
                return problem, found, damping
            if damping >= HIGHEST_DAMPING:
                raise nmbench.NumericalFailure(f"the Gram matrix has no Cholesky factor even with damping {damping:g}.")
            damping = min(max(10 * damping, 0.01), HIGHEST_DAMPING)
