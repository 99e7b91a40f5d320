"""Flips: a mask changed step by step, by what the dense model's activations ask for, from forward passes alone.

A step of the learner has four parts.

1. Evidence. The same windows go through the dense and the pruned model. T `[tokens, out]` is the error that a layer
   could take away. For a layer that writes into the residual stream, T is the error of the model's output: the
   derivative of KL(dense || pruned) by the hidden state after the last block, which is the error of the probabilities
   times the output embedding, through the last norm, and is sent to every block as it is (direct feedback with
   identity weights: arXiv 1609.01596). Nothing goes back through a block. For any other layer, T is the error of its
   own outputs. With the inputs X of the layer in the pruned model, the evidence is E = T^T X, beside H = X^T X.
2. Proposal. Let e be the pruned part of a row and e_0 that part now. Sweeps of `swaps` look for the mask that minimises
   |X (e - e_0) - s T|^2, that is e H e^T - 2 (e_0 H + s E) e^T up to a constant. The step size s is the share of the
   error to take away. Groups flip only where the flip pays by this measure.
3. Screening. Units are blocks of rows of a layer. Every sequence of a minibatch gets the flips of a random half of
   the units, y = x W + x dW_s, and then those of the other half. The difference of its two losses, times +1 or -1 for
   every unit, is the effect of this unit, so that one pair of forward passes says something about all units. Units
   that seem to do harm are left out, and their step sizes fall; those of the others rise.
4. Confirmation. The flips that are left are taken if they lower the loss of fresh windows, in pairs, by `margin`
   standard errors. Otherwise the mask stays: nothing drifts.

With `evidence=rewards` the evidence is that of losses alone: every sequence flips a few random groups of every layer
(`rewards`). docs/benchmarks/flips.md measures what either kind of evidence knows.

At the end the best mask of the first half of the selection windows must be confirmed by the other half.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import nmbench

if TYPE_CHECKING:
    from torch import Tensor

EVIDENCE = ("both", "output", "local", "rewards")
LEAST = {
    "steps": 0,
    "sweeps": 1,
    "units": 1,
    "evidence_tokens": 1,
    "reward_tokens": 2,
    "screen_tokens": 2,
    "confirm_tokens": 2,
    "window_tokens": 2,
    "pool_windows": 1,
    "minibatch": 1,
    "skip_tokens": 0,
    "margin": 0.0,
    "tolerance": 0.0,
    "check_every": 1,
    "checkpoint_every": 1,
}


@dataclass(frozen=True)
class Flips(nmbench.MaskLearner):
    """Flip groups by the errors of activations, screened and confirmed by losses; forward passes only."""

    eight_bit = True

    init: str = nmbench.option("swaps", "whose mask is the start: a one-shot method, or a label of the same run")
    steps: int = nmbench.option(60, "proposals, each screened and confirmed", unit="steps")
    evidence: str = nmbench.option(
        "both",
        "errors that flips take away: of the model's output, of a layer's outputs, or both; or rewards of random flips",
        choices=EVIDENCE,
    )
    output_step: float = nmbench.option(0.15, "step size s of layers that write into the residual stream, at first")
    local_step: float = nmbench.option(0.3, "step size s of other layers, at first: the share of their error")
    adapt: float = nmbench.option(
        0.3, "how fast step sizes follow the screening: the most that their logarithm changes"
    )
    decay: float = nmbench.option(0.7, "weight of earlier evidence, which is kept as one float32 a weight; 0: none")
    sweeps: int = nmbench.option(2, "most sweeps over the groups of a layer for a proposal")
    units: int = nmbench.option(1, "blocks of rows in a layer that are screened and sized by themselves")
    evidence_tokens: int = nmbench.option(12288, "tokens of a step for the evidence", unit="tokens")
    reward_tokens: int = nmbench.option(65536, "tokens of a step for rewards", unit="tokens")
    flips: float = nmbench.option(0.005, "share of the groups that a sequence flips for its reward")
    cheap: float = nmbench.option(0.25, "share of the groups to draw these flips from: the cheapest flips of a layer")
    shortlist: float = nmbench.option(0.005, "share of the groups that the best scores propose to flip, at first")
    screen_tokens: int = nmbench.option(8192, "tokens of a step for the screening", unit="tokens")
    confirm_tokens: int = nmbench.option(8192, "tokens of a step for the confirmation", unit="tokens")
    window_tokens: int = nmbench.option(128, "length of a sequence to screen and confirm by, at most", unit="tokens")
    pool_windows: int | None = nmbench.option(
        None, "learn from this many windows of window_tokens; none: the whole pool", unit="windows"
    )
    minibatch: int = nmbench.option(16, "windows that go through the model at once", unit="windows")
    skip_tokens: int = nmbench.option(1, "first tokens of every window that are left out of the evidence")
    doubt: float = nmbench.option(0.5, "standard errors of harm from which on a unit is left out")
    margin: float = nmbench.option(1.0, "standard errors by which flips must lower the loss")
    tolerance: float = nmbench.option(0.0, "rise over the initial loss that still counts as not worse", unit="nats")
    check_every: int = nmbench.option(10, "steps between two measurements on selection windows", unit="steps")
    checkpoint_every: int = nmbench.option(10, "steps between two checkpoints", unit="steps")

    def __post_init__(self) -> None:
        nmbench.check_least(self, "flips", LEAST)
        for name, most in {"output_step": 2, "local_step": 2, "flips": 1, "cheap": 1, "shortlist": 1}.items():
            if not 0 < getattr(self, name) <= most:
                raise impossible(f"{name} must be above 0 and at most {most}, not {getattr(self, name)}")
        if not 0 <= self.decay < 1:
            raise impossible(f"decay must lie in [0, 1), not {self.decay}")
        if not 0 <= self.adapt <= 1:
            raise impossible(f"adapt must lie in [0, 1], not {self.adapt}")

    def supports(self, pattern: nmbench.Pattern) -> str | None:
        if pattern.unit > 1 and self.evidence == "rewards":
            return "evidence=rewards flips single weights; take another evidence, or a pattern N:M without units"
        return None

    def bytes_per_weight(self, itemsize: int) -> float:
        """Return the bytes of a dense copy, three masks, earlier evidence, that of a step, and its Gram matrices.

        A Gram matrix has `in * in` numbers where a layer has `out * in`, and layers with the same inputs share one: 3.8
        bytes a weight in SmolLM2-135M, 4.7 in Llama 3.1 8B.
        """
        return itemsize + 3 + (4 if self.decay else 0) + 4 + 4

    def learn(self, task: nmbench.LearnTask) -> Mapping[str, Tensor]:
        """Return the best mask, if held-out windows confirm that mask, else the initial mask."""
        import torch

        from nmbench_plugins.swaps.flips_run import FlipsRun

        with torch.no_grad(), task.live_weights() as live:
            return FlipsRun(task, self, live).learnt()


def impossible(what: str) -> nmbench.NMBenchError:
    return nmbench.NMBenchError(f"option flips.{what}.")
