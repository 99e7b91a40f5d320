"""RoI: a soft Gumbel-top-N relaxation of strict N:M masks (arXiv 2608.23048).

One logit phi per weight, as in MaskPro, or per unit where units have several weights. Every step draws the soft mask m
of each group from phi / lam + Gumbel noise at temperature tau (`relaxation`), computes the loss of the model with the
weights W * m, and takes a step of Adam on phi.
Temperature and noise scale fall exponentially over three quarters of the steps, tau from 1 to 0.05 and lam from 0.02 to
0.002, and stay there. The mask keeps the N largest logits of every group; weights never change.

Our own, for budgets far below the paper's 2 billion tokens: logits begin at the mask of another method (`prior`), the
loss is the divergence from the dense model, and the greedy mask is chosen on held-out windows, where it must beat the
start on windows that were not read before.

With `scope=block` the masks of one block after the other are learnt by the outputs of the block (`block_training`), so
that the model may be larger than the GPU.

With `estimator=straight-through` (Bengio et al., arXiv 1308.3432) the forward pass has the mask of the largest logits,
without noise, and the gradient of the mask is taken for that of the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import nmbench

if TYPE_CHECKING:
    from torch import Tensor

SCOPES = ("model", "block")
ESTIMATORS = ("soft", "straight-through")
LOGIT = 4  # bytes a weight
MOMENTS = {"float32": 8, "bfloat16": 4}  # bytes a weight, of both moments
LONG = {
    "passes": 15.0,
    "minibatch": 16,
    "learning_rate": 5e-4,
    "leave": 0.2,
    "compile": True,
    "moments": "bfloat16",
    "check_every": 200,
    "checkpoint_every": 500,
}
STRAIGHT = {  # of small models on a CPU
    "estimator": "straight-through",
    "passes": 2.0,
    "minibatch": 2,
    "learning_rate": 1e-3,
    "check_every": 192,
}


@dataclass(frozen=True)
class Soft(nmbench.MaskLearner):
    """Learn mask logits by gradients through a soft, annealed draw of N of M; weights stay dense."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"long": LONG, "straight-through": STRAIGHT}

    init: str = nmbench.option("swaps", "whose mask is the start: a one-shot method, or a label of the same run")
    scope: str = nmbench.option("model", "what is learnt at once, and by whose outputs", choices=SCOPES)
    target: float = nmbench.option(0.5, "outputs of a block to aim at, from the pruned path (0) to the dense path (1)")
    estimator: str = nmbench.option("soft", "how gradients reach the logits", choices=ESTIMATORS)
    passes: float = nmbench.option(1.0, "passes over the pool")
    tokens: int | None = nmbench.option(None, "tokens to learn from; none: as many as `passes` say", unit="tokens")
    kl: float = nmbench.option(1.0, "share of the divergence from the dense model; the rest is cross-entropy")
    learning_rate: float = nmbench.option(2e-3, "step size of Adam on the logits, at the first step")
    fall: float = nmbench.option(0.1, "step size at the last step, relative to the first; it falls linearly")
    leave: float = nmbench.option(0.35, "probability that a draw of a group leaves the start, at the first step")
    first_noise: float = nmbench.option(0.02, "noise scale at the first step: logits are divided by it")
    last_noise: float = nmbench.option(0.002, "noise scale after three quarters of the steps")
    moments: str = nmbench.option("float32", "dtype in which the moments of Adam are kept", choices=tuple(MOMENTS))
    minibatch: int = nmbench.option(4, "windows per step", unit="windows")
    window_tokens: int | None = nmbench.option(None, "window length; none: the pool's", unit="tokens")
    compile: bool = nmbench.option(False, "on a GPU, fuse the work between the matrix products of a step")
    check_every: int = nmbench.option(50, "steps between two measurements on selection windows", unit="steps")
    checkpoint_every: int = nmbench.option(100, "steps between two checkpoints", unit="steps")

    def __post_init__(self) -> None:
        least = {"passes": 0, "tokens": 0, "minibatch": 1, "window_tokens": 2, "check_every": 1, "checkpoint_every": 1}
        nmbench.check_least(self, "soft", least)
        for name in ("kl", "fall", "target"):
            if not 0 <= getattr(self, name) <= 1:
                raise impossible(f"{name} must lie in [0, 1], not {getattr(self, name)}")
        for name in ("learning_rate", "first_noise", "last_noise"):
            if not 0 < getattr(self, name) < float("inf"):
                raise impossible(f"{name} must be above 0, not {getattr(self, name)}")
        if not 0 < self.leave < 1:
            raise impossible(f"leave must lie between 0 and 1, not {self.leave}")

    @property
    def straight(self) -> bool:
        """True for the straight-through estimator."""
        return self.estimator == "straight-through"

    @property
    def noise(self) -> tuple[float, float]:
        """The noise scale of the first step, and after the annealing."""
        return self.first_noise, self.last_noise

    @property
    def blockwise(self) -> bool:
        """True if masks are learnt block by block."""
        return self.scope == "block"

    @property
    def data_parallel(self) -> bool:
        """True if ranks share every minibatch, as they do unless blocks are learnt one by one."""
        return not self.blockwise

    def bytes_per_weight(self, itemsize: int) -> float:
        """Return the bytes of logits, moments, a gradient of the live weight, and the dense weight."""
        return LOGIT + MOMENTS[self.moments] + 2 * itemsize

    def learn(self, task: nmbench.LearnTask) -> Mapping[str, Tensor]:
        """Return the learnt mask by layer, or that of the start if it is not better."""
        if self.blockwise:
            from nmbench_plugins.soft.block_training import learnt_by_blocks

            return learnt_by_blocks(self, task)
        from nmbench_plugins.soft.training import learnt

        return learnt(self, task)


def impossible(what: str) -> nmbench.NMBenchError:
    return nmbench.NMBenchError(f"option soft.{what}.")
