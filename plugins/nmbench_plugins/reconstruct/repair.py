"""Local reconstruction after any mask (arXiv 2510.14444): block by block, the kept weights are trained.

For one block with kept weights W, inputs X of the pruned model and Y of the dense model, and the dense block f, the
method lowers by Adam the mean square of

    g(X; W) - T,    T = (1 - a) f(X) + a f(Y)

where g is the block under W. a = 0 aims at what the dense block makes of the inputs it will really have, a = 1 at the
dense model; between them the block corrects a share of the error that it inherits. A block whose error has not fallen
keeps its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import nmbench

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Reconstruct(nmbench.BlockRepair):
    """Reconstruct, block by block: kept weights are trained by Adam to give the outputs of the dense block."""

    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"long": {"steps": 400, "windows": None}}

    scope: str = nmbench.option(
        "block",
        "what is trained at once: the whole block, attention and MLP apart, or each layer",
        choices=nmbench.SCOPES,
    )
    target: float = nmbench.option(0.5, "outputs to aim at, from the pruned path (0) to the dense path (1)")
    windows: int | None = nmbench.option(256, "pool windows to train on; none: all that are read", unit="windows")
    minibatch: int = nmbench.option(8, "windows per step", unit="windows")
    steps: int = nmbench.option(200, "updates of each part", unit="steps")
    learning_rate: float = nmbench.option(1e-3, "step size of Adam, which falls linearly to 0")
    warmup: float = nmbench.option(0.05, "share of the steps in which the step size rises")
    norms: bool = nmbench.option(False, "train norms and biases of the block as well")

    @property
    def dense_path(self) -> bool:
        """True unless the target is on the pruned path."""
        return self.target != 0

    @property
    def windows_read(self) -> int:
        """The number of pool windows that the updates of one part can read, at least one minibatch."""
        read = max(self.steps, 1) * self.minibatch
        return read if self.windows is None else min(self.windows, read)

    def repair_block(self, block: nmbench.BlockTask) -> Mapping[str, Tensor]:
        """Return the trained weights of one block, where its error fell."""
        from nmbench_plugins.reconstruct.training import Plan, trained

        plan = Plan(self.steps, self.learning_rate, self.warmup, self.target)
        found: dict[str, Tensor] = {}
        for part in block.parts(self.scope):
            others = {name: tensor for name, tensor in block.others.items() if name.startswith(f"{part.name}.")}
            tensors = trained(block, part, others if self.norms else {}, plan)
            part.write(tensors)
            found.update(tensors)
        return found
