"""ProxSparse: masks from training under a penalty that vanishes on N:M (arXiv 2502.00258).

All prunable weights are trained, from the dense ones, by Adam on

    (1 - k) x cross-entropy of the text + k x KL(dense || trained),    in nats per token,

and after every update every group takes the proximal operator of lam R (`operator`), which pulls the smallest weights
of a group to 0 and leaves groups of at most N weights alone. The mask keeps the N largest trained weights of every
group; it is applied to the dense weights, which never change.

Our own: any N:M, by R = e_(N+1); float32 masters; the search for lam (`search`); masters of weights that the start
drops begin at a share of the dense weight; the best mask on held-out windows, which must beat the start on windows
that were not read before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import nmbench

if TYPE_CHECKING:
    from torch import Tensor

MASTER, MOMENTS = 4, 8  # bytes a weight
PAPER = {"passes": 1.0, "minibatch": 1, "learning_rate": 1e-4, "kl": 0.0, "shrink": 1.0, "lam": 0.25}


@dataclass(frozen=True)
class ProxSparse(nmbench.MaskLearner):
    """Train all weights under a penalty that vanishes on N:M; the mask of the largest goes to the dense weights."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": PAPER}
    data_parallel = True

    init: str = nmbench.option(
        "swaps",
        "whose mask is the start, a one-shot method or a label of the same run: what it drops begins at `shrink`, and "
        "it is the fall-back",
    )
    shrink: float = nmbench.option(
        0.25,
        "share of the dense weight at which weights dropped by the start begin; 1: the start is the fall-back alone",
    )
    lam: float | None = nmbench.option(None, "strength of the penalty in every update; none: searched for by trials")
    trials: int = nmbench.option(3, "trials of the search for lam at most")
    search: float = nmbench.option(0.5, "share of the budget that the trials may take")
    passes: float = nmbench.option(1.0, "passes over the pool, trials included")
    tokens: int | None = nmbench.option(None, "tokens to learn from; none: as many as `passes` say", unit="tokens")
    kl: float = nmbench.option(1.0, "share of the divergence from the dense model; the rest is cross-entropy")
    learning_rate: float = nmbench.option(3e-3, "step size of Adam, which falls linearly to 0")
    warmup: float = nmbench.option(0.1, "share of the steps in which the step size rises")
    minibatch: int = nmbench.option(4, "windows per step", unit="windows")
    window_tokens: int | None = nmbench.option(None, "window length; none: the pool's", unit="tokens")
    check_every: int = nmbench.option(50, "steps between two measurements on selection windows", unit="steps")
    checkpoint_every: int = nmbench.option(100, "steps between two checkpoints", unit="steps")

    def __post_init__(self) -> None:
        least = {"passes": 0, "tokens": 0, "lam": 0, "trials": 1, "minibatch": 1, "window_tokens": 2}
        for name, value in {**least, "check_every": 1, "checkpoint_every": 1}.items():
            given = getattr(self, name)
            if given is not None and not value <= given < float("inf"):
                raise impossible(f"{name} must be at least {value} and finite, not {given}")
        for name in ("kl", "shrink", "search", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise impossible(f"{name} must lie in [0, 1], not {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf"):
            raise impossible(f"learning_rate must be above 0, not {self.learning_rate}")

    def supports(self, pattern: nmbench.Pattern) -> str | None:
        if pattern.unit == 1:
            return None
        return "its penalty counts single weights; it supports every N:M without a unit, such as 2:4 and 4:8."

    def bytes_per_weight(self, itemsize: int) -> float:
        """Return the bytes of masters, moments, a gradient of the live weight, and the dense weight."""
        return MASTER + MOMENTS + 2 * itemsize

    def learn(self, task: nmbench.LearnTask) -> Mapping[str, Tensor]:
        """Return the learnt mask by layer, or that of the start if it is not better."""
        from nmbench_plugins.proxsparse.training import Run

        return Run(self, task).result()


def impossible(what: str) -> nmbench.NMBenchError:
    return nmbench.NMBenchError(f"option proxsparse.{what}.")
