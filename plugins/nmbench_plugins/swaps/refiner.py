"""Swaps: exact refinement of a mask inside its groups, on frozen weights, from the Gram matrix of the layer's inputs.

Related: SparseSwaps (arXiv 2512.10922). For one output row w let e be its pruned part (w where dropped, else 0), X the
inputs and Y those in the dense model, H = X^T X and D = (Y - X)^T X. The distance of the row's outputs from a target
between X w (a = 0) and Y w (a = 1) is up to a constant

    |X e + a (Y - X) w|^2  =  e H e^T + 2 a w D e^T.

A layer that writes into the residual stream can also compensate for the errors accumulated in that stream. Let r be the
residual stream to which the row's outputs are added, and q that stream in the dense model. With b (q - r) in the target
as well, the distance is

    |X e + a (Y - X) w + b (q - r)|^2  =  e H e^T + 2 l e^T,    l = a w D + b (q - r)^T X = (a - b) w D + b L,

up to a constant, where L = (q + Y w - r - X w)^T X is the row of `LayerStats.lag`.

With everything outside a group g fixed, p = (e H + l)_g - e_g H_gg, the part c of g that is dropped costs
c H_gg c^T + 2 c p, so that the best of the C(M, N) patterns is found by comparing all patterns. Groups are swept from
left to right, all rows at once, e H following every change, until nothing changes. The error never rises.

Where a group has too many patterns, the sweep makes the best exchange of one kept and one dropped weight instead:
dropping k costs w_k^2 H_kk + 2 w_k t_k, restoring d costs w_d^2 H_dd - 2 w_d t_d, both together - 2 w_k w_d H_kd more,
where t = (e H + l)_g. Where the pattern has units of several weights, all this is of units: their weights, and the
products of these with blocks of H, are summed.

The best (a, b) differs from model to model. A layer can compensate for the losses of the blocks above only in part,
which may be the reason why the deeper of two models needs smaller numbers. Figures at 2:4, one run each, for (a, b):

SmolLM2-135M, 30 blocks, perplexity on a validation text, by a prototype: (.25, 0) 103.6, (.25, .25) 97.9,
(.15, .15) 91.2, (.4, .4) 116.7; and (.25, .25) without the first token of every window, an attention sink with by far
the largest activations, 91.4.

The demo, 4 blocks, nats over dense on the selection plays, without first tokens, 4 sweeps: (.2, 0) .666, (.2, .2) .635,
(.4, .4) .614, (.6, 0) .600, (.6, .6) .584. Runs that differ only in the limit of sweeps are up to .04 apart, and first
tokens make no difference. The defaults are meant for deep models; all figures: `benchmarks/swaps_defaults.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import nmbench
from nmbench_plugins.swaps.aim import Aim

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Swaps(nmbench.Refiner):
    """Choose the best pattern of each group given all others, in several sweeps; weights do not change."""

    sweeps: int = nmbench.option(4, "most sweeps over the groups of a layer; ends earlier when nothing changes")
    dense_weight: float = nmbench.option(
        0.15,
        "aim at the layer's outputs on pruned inputs (0), in the dense model (1), or between; try several: of "
        "those tried, 0.15 was best for SmolLM2-135M (30 blocks), 0.6 for the demo (4), together with residual_weight",
    )
    residual_weight: float = nmbench.option(
        0.15,
        "aim at compensating none (0) to all (1) of the error in the residual stream that the layer writes into; "
        "see dense_weight",
    )
    skip_tokens: int = nmbench.option(
        1,
        "first tokens of every window that are left out of the statistics: attention sinks with huge activations",
    )
    sequential: bool = nmbench.option(
        True, "gather the inputs of a layer after the layers before it in its block are pruned"
    )

    def __post_init__(self) -> None:
        weights = self.dense_weight, self.residual_weight
        if self.sweeps < 1 or self.skip_tokens < 0 or not all(0 <= weight <= 1 for weight in weights):
            raise nmbench.NMBenchError(
                "swaps needs sweeps >= 1, dense_weight and residual_weight from 0 to 1, and skip_tokens >= 0."
            )

    @property
    def aim(self) -> Aim:
        return Aim(self.dense_weight, self.residual_weight)

    @property
    def needs(self) -> nmbench.Stat:
        return self.aim.needs

    def refine(
        self, weight: Tensor, stats: nmbench.LayerStats, mask: Tensor, pattern: nmbench.Pattern
    ) -> nmbench.Pruned:
        from nmbench_plugins.swaps.descent import descend
        from nmbench_plugins.swaps.problem import TINY, Problem

        assert stats.gram is not None
        problem = Problem.of(weight, stats.gram, *self.aim.target(stats), pattern)
        dropped = (~mask).t().float().contiguous()  # [in, out]
        before = problem.error(dropped)
        refined, used = descend(problem, dropped, self.sweeps)
        changed = (refined != dropped).unflatten(0, (-1, pattern.group)).any(dim=1).float().mean()
        fall = (before - problem.error(refined)) / problem.pruned_error(dropped).clamp_min(TINY)
        figures = {"error_fall": float(fall), "groups_changed": float(changed), "sweeps": float(used)}
        return nmbench.Pruned((refined == 0).t().contiguous(), figures=figures)
