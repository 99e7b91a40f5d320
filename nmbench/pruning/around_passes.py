"""The work of an update on all layers, before and after the passes of the model: each a CUDA graph where it can be.

Compiled passes, and those whose gradients ranks add up, run by themselves (`Replay` says why). They may take less time
than launching some kernels for every layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nmbench.pruning.replay import captured
from nmbench.pruning.training import Training


class AroundPasses:
    """`write()` sets all live weights, and `learn()` takes all steps by their gradients; one update calls both, once.

    `due`: they are to be captured before they are called for the first time. Where `Replay` captures whole updates, it
    is False.
    """

    def __init__(
        self, live: Training, write: Callable[[], None], learn: Callable[[], None], graph: bool = True
    ) -> None:
        self.live, self.write, self.learn = live, write, learn
        self.due = graph and live.bundle.device.type == "cuda" and not live.capturable
        self.writing: torch.cuda.CUDAGraph | None = None
        self.learning: torch.cuda.CUDAGraph | None = None

    def capture(self) -> None:
        """Capture both, by trials; the caller sees to it that these change nothing."""
        self.due = False
        self.live.hold_gradients()
        self.writing, self.learning = captured(self.live, self.write), captured(self.live, self.learn)

    def before(self) -> None:
        """Set all live weights."""
        (self.writing.replay if self.writing else self.write)()

    def after(self) -> None:
        """Take the steps of all layers by their gradients."""
        (self.learning.replay if self.learning else self.learn)()
