"""Swaps, judged: the Gram matrices propose masks, the loss of the model decides.

`swaps` aims the outputs of every layer at a point between its outputs on pruned inputs and its outputs in the dense
model. The best point is not known, and `swaps` uses one point for all layers. Here the loss of the model decides. In
every round the blocks are visited from first to last, and the layers of a block in the order of execution, layers with
shared inputs together. The statistics of the inputs are gathered with all other layers under their present masks. Every
aim (a, b) in a list gives one proposal: the mask that sweeps of swaps reach from the present mask. Each proposal is
tried in the pruned model, on windows drawn for this block. The proposal with the lowest mean loss is taken if its
paired difference to the present mask is below zero by `margin` standard errors; else nothing changes. So the method is
a block coordinate descent of the loss, in which one proposal may change thousands of groups at once.

Therefore few tokens suffice: a policy gradient has to estimate from one number, the loss, the effect of every weight;
here the loss only chooses among a handful of proposals.

Only forward passes are used, and dense weights are frozen. Besides losses, the method uses the statistics of `swaps`:
the Gram matrix of the inputs of a layer, and the differences of these inputs and of the residual stream from the dense
model.

After every round the mask is measured on one half of the selection windows, and the best mask is kept. At the end the
other half must confirm the best mask: the initial mask is returned unless the one-sided 95 % bound of the paired
difference is within the tolerance.

Preset `long` uses two to three times the tokens, so that smaller gains stand out from noise.

Idea: proposals from second-order statistics accepted by paired losses; we know of no publication of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import nmbench
from nmbench_plugins.swaps.aim import Aim

if TYPE_CHECKING:
    from torch import Tensor

LONG = {"statistics_tokens": 196608, "judge_tokens": 98304}


@dataclass(frozen=True)
class SwapsJudged(nmbench.MaskLearner):
    """Let swaps propose masks, layer by layer, and the model's loss choose among them; weights do not change."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"long": LONG}
    eight_bit = True

    init: str = nmbench.option(
        "swaps",
        "method or label whose mask, on the dense weights, is the start: a one-shot method, or a label of the same run",
    )
    rounds: int = nmbench.option(2, "visits to all blocks")
    aims: str = nmbench.option(
        "0/0, -0.15/-0.15, 0.15/0.15, 0.3/0.3, 0.6/0.6, 0.4/0.1, 0.1/0.4",
        "proposals: dense_weight/residual_weight of swaps, from -2 to 2",
    )
    sweeps: int = nmbench.option(3, "most sweeps over the groups of a layer for a proposal")
    statistics_tokens: int = nmbench.option(98304, "calibration tokens for the statistics of a round", unit="tokens")
    judge_tokens: int = nmbench.option(32768, "tokens on which the proposals of a block are tried", unit="tokens")
    judge_window: int = nmbench.option(512, "longest window to try proposals on", unit="tokens")
    minibatch: int = nmbench.option(32, "windows that go through the model at once", unit="windows")
    margin: float = nmbench.option(1.0, "standard errors by which a proposal must lower the loss")
    skip_tokens: int = nmbench.option(1, "first tokens of every window that are left out of the statistics")
    tolerance: float = nmbench.option(0.005, "rise over the initial loss that still counts as not worse", unit="nats")

    def __post_init__(self) -> None:
        least = {"rounds": 0, "sweeps": 1, "minibatch": 1, "judge_window": 2, "skip_tokens": 0, "margin": 0.0}
        least |= {"tolerance": 0.0, "statistics_tokens": 1, "judge_tokens": 1}
        nmbench.check_least(self, "swaps-judged", least)
        try:
            Aim.parsed(self.aims)
        except ValueError:
            raise nmbench.NMBenchError(
                f"option swaps-judged.aims must be like '0/0, 0.3/0.3', numbers from -2 to 2, all pairs different; got "
                f"{self.aims!r}."
            ) from None

    def bytes_per_weight(self, itemsize: int) -> float:
        """Return the bytes of a dense copy and of two masks: the present mask and the best mask."""
        return itemsize + 2

    def learn(self, task: nmbench.LearnTask) -> Mapping[str, Tensor]:
        """Return the best mask, if held-out windows confirm that mask, else the initial mask."""
        import torch

        from nmbench_plugins.swaps.judged_run import JudgedRun

        with torch.no_grad(), task.live_weights() as live:
            return JudgedRun(task, self, live).learnt()
