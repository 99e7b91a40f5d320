"""MaskPro: Linear-Space Probabilistic Learning for Strict (N:M)-Sparsity on Large Language Models (arXiv 2506.12876).

One logit per weight; every group of M draws N without replacement with p = softmax(logits). With f the mean token
cross-entropy of the masked dense model, m_0 the initial mask and m_t the mask drawn at step t, each step does

    r      = f(m_t) - f(m_0)            on the same minibatch: forward passes only
    delta <- 0.99 delta + 0.01 r        the moving average of loss residuals
    logits <- logits - lr * (r - delta) * grad log P(m_t)

from logits C * m_0, and the final mask keeps the N largest logits of every group. Preset `paper` is the published
setting. The default differs from it in three named options: `normalise` divides r - delta by its running spread, so
that one learning rate suits models of any size; `shuffle` draws minibatches at random from the whole pool; and `select`
watches held-out windows (see `watch`): it goes back to the best mask with half the step size when learning drifts, and
returns the best mask seen, or the initial one if other windows do not confirm that it is not worse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import nmbench
from nmbench.live import LiveWeights
from nmbench_plugins.maskpro.base import PolicyLearner
from nmbench_plugins.maskpro.engine import Engine
from nmbench_plugins.maskpro.engines import choose
from nmbench_plugins.maskpro.tracker import Rule

PAPER = {
    "steps": 10_000,
    "learning_rate": 50.0,
    "prior": 10.0,
    "minibatch": 32,
    "window_tokens": 128,
    "pool_windows": 512,
    "shuffle": False,
    "normalise": False,
    "select": False,
}


@dataclass(frozen=True)
class MaskPro(PolicyLearner):
    """Learn one categorical distribution per group by policy gradient, from forward losses only; weights stay dense."""

    registered: ClassVar[str] = "maskpro"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": PAPER}

    tracker: float = nmbench.option(0.99, "decay of the moving average of loss residuals")
    normalise: bool = nmbench.option(True, "divide the advantage by its running spread")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tracker < 1:
            raise self.impossible(f"tracker must lie in [0, 1), not {self.tracker}")

    def computing(self, task: nmbench.LearnTask, live: LiveWeights) -> Engine:
        rule = Rule(self.learning_rate, self.prior, self.tracker, self.normalise)
        return choose(task, live, rule, self.engine, self.logits)
