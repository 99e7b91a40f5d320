"""The work of an update on all layers, before and after the passes of the model: each a CUDA graph where it can be.

Compiled passes, and those whose gradients ranks add up, run by themselves (`Replay` says why). They may take less time
than launching some kernels for every layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nmbench.errors import first_line
from nmbench.pruning.training import Training
from nmbench.runtime.cuda_graphs import graph_of


class AroundPasses:
    """`write()` sets all live weights, and `learn()` takes all steps by their gradients; one update calls both, once.

    `due`: they are to be captured before they are called for the first time. Where `Replay` captures whole updates, it
    is False.
    """

    def __init__(
        self, live: Training, write: Callable[[], None], learn: Callable[[], None], graph: bool = True
    ) -> None:
        self.live, self.write, self.learn = live, write, learn
        self.due = graph and live.bundle.device.type == "cuda" and (live.compiled or live.ranks.size > 1)
        self.graphs: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph] | None = None

    def capture(self) -> None:
        """Capture both, by trials; the caller sees to it that these change nothing."""
        self.due = False
        self.live.hold_gradients()
        try:
            self.graphs = graph_of(self.write), graph_of(self.learn)
        except RuntimeError as error:
            self.live.task.notes["cuda graph"] = f"none: {first_line(error)}"

    def before(self) -> None:
        """Set all live weights."""
        (self.graphs[0].replay if self.graphs else self.write)()

    def after(self) -> None:
        """Take the steps of all layers by their gradients."""
        (self.graphs[1].replay if self.graphs else self.learn)()
