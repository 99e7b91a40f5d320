"""MaskPro-plus: the policy of MaskPro (arXiv 2506.12876), learnt with a mask for every window.

Logits, policy, prior, frozen dense weights, forward losses alone and the choice by held-out windows are those of
`learner`. This is *not* the published algorithm. It differs in exactly four points:

1. One mask per window. Each step draws two masks A and B of the whole model; a fair coin z[s, o] for every window s of
   the minibatch and every output row o of every layer says with which of the two the row is computed. Rows are
   independent under the policy, so every window sees an exact sample of the policy, and one forward pass gives as many
   rewards as windows, instead of one. Since the advantages add up to 0,

       sum over s of a_s grad log P(mask of s)  =  1/2 sum over s of a_s c[s, o] * (grad log P(A) - grad log P(B))

   in row o, with c = +1 for A and -1 for B: nothing moves where A and B agree. With a_s = r_s - mean r, this divided by
   (windows - 1) / 2 is an unbiased estimate of the gradient of the mean loss: a row's coins have mean 0 given all that
   does not depend on them, so other windows' rewards cancel on average, and what is left of r_s in its own advantage,
   1 - 1 / windows, and of its own row, a half, make up the divisor.
2. Leave-one-out advantage instead of the tracker: r_s is the loss of the window less its loss under the initial mask,
   and a_s = (r_s - mean r) / std r over the minibatch. `pair_tracker` states how the sum is scaled.
3. The learning rate falls to 0 in a straight line over all steps, unless `decay` is off.
4. It starts from the mask that `swaps` finds, unless `init` says otherwise.

A step computes two products per layer, so its tokens count twice in `cost.forward_tokens`, which is more than fair to
MaskPro: attention, norms and the output head are computed once.

Whether the gradient is less noisy depends on the losses. Over masks, let tau^2 be the variance of what all windows
share, and omega^2 that of what each has for itself. Where no single row matters much, with minibatches of n windows on
both sides and as many counted tokens, the variance is 4 (tau^2 + omega^2) / (n tau^2 + omega^2) times MaskPro's: tokens
count twice, and a difference of two gradients has twice the variance. That is less than 1 if 3 omega^2 < (n - 4) tau^2,
so large minibatches suit it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

import nmbench
from nmbench.live import LiveWeights
from nmbench_plugins.maskpro.base import PolicyLearner
from nmbench_plugins.maskpro.engine import Engine
from nmbench_plugins.maskpro.pair_engines import choose_pair
from nmbench_plugins.maskpro.pair_tracker import PairRule


@dataclass(frozen=True)
class MaskProPlus(PolicyLearner):
    """MaskPro with one mask per window, a leave-one-out advantage, a falling learning rate and a start from swaps."""

    registered: ClassVar[str] = "maskpro-plus"
    least_minibatch: ClassVar[int] = 2

    init: str = nmbench.option("swaps", "registered one-shot method whose mask, on the dense weights, is the start")
    minibatch: int = nmbench.option(32, "windows per step, each with a mask of its own", unit="windows")
    decay: bool = nmbench.option(True, "let the learning rate fall to 0 in a straight line over all steps")

    def computing(self, task: nmbench.LearnTask, live: LiveWeights) -> Engine:
        rule = PairRule(self.learning_rate, self.prior, self.steps if self.decay else None)
        return choose_pair(task, live, rule, self.engine, self.logits)

    def pool(self, task: nmbench.LearnTask) -> Tensor:
        windows = super().pool(task)
        if len(windows) < self.least_minibatch:
            raise nmbench.NMBenchError(f"{task.who} compares windows and needs 2 at least; raise --pool-tokens.")
        return windows
