"""Distillation of the dense model into the kept weights under a fixed mask.

One step lowers, by Adam on float32 masters of the kept weights W,

    (1 - k) x cross-entropy of the text + k x KL(dense || pruned),    in nats per token.

With `refresh_every`, the mask is chosen anew from the magnitudes of all masters every so many steps, as in AST (arXiv
2407.20584) and CAST (arXiv 2509.25996). Dropped masters then live on: they follow the gradient of the masked weight
(straight-through) and are pulled to 0 by `decay` (SR-STE, arXiv 2102.04010). The masters of dropped weights begin below
the kept ones of their group, so that the first mask is the start's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import nmbench

MASTER, GRADIENT, MOMENTS = 4, 4, 8  # bytes a weight
LONG = {"passes": 20.0, "minibatch": 16, "compile": True, "check_every": 200}


@dataclass(frozen=True)
class Distil(nmbench.WeightLearner):
    """Distil: the kept weights of the whole model learn the outputs of the dense model."""

    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"long": LONG}
    data_parallel = True

    passes: float = nmbench.option(1.0, "passes over the pool")
    tokens: int | None = nmbench.option(None, "tokens to train on; none: as many as `passes` say", unit="tokens")
    kl: float = nmbench.option(1.0, "share of the divergence from the dense model; the rest is cross-entropy")
    learning_rate: float = nmbench.option(1e-3, "step size of Adam, which falls linearly to 0")
    warmup: float = nmbench.option(0.05, "share of the steps in which the step size rises")
    minibatch: int = nmbench.option(8, "windows per step", unit="windows")
    window_tokens: int | None = nmbench.option(None, "window length; none: the pool's", unit="tokens")
    refresh_every: int = nmbench.option(0, "steps between two choices of the mask by magnitude; 0: the mask stays")
    decay: float = nmbench.option(2e-4, "pull of dropped weights to 0, if the mask is chosen anew")
    compile: bool = nmbench.option(False, "on a GPU, fuse the work between the matrix products of a step")
    check_every: int = nmbench.option(50, "steps between two measurements on selection windows", unit="steps")
    checkpoint_every: int = nmbench.option(100, "steps between two checkpoints", unit="steps")

    @property
    def chooses(self) -> bool:
        """True if the mask is chosen anew."""
        return self.refresh_every > 0

    def bytes_per_weight(self, itemsize: int) -> float:
        """Return the bytes of masters, gradients in both dtypes, moments, and the dense weights of the teacher."""
        return MASTER + GRADIENT + MOMENTS + 2 * itemsize

    def learn(self, task: nmbench.WeightTask) -> Mapping[str, nmbench.Pruned]:
        """Return masks and trained weights of all layers."""
        from nmbench_plugins.distil.training import Run

        return Run(self, task).result()
