"""An update of a learner by a whole minibatch; on a CUDA device it is captured as a CUDA graph once, and replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nmbench.errors import first_line
from nmbench.evaluation.objective import Objective
from nmbench.pruning.training import Training
from nmbench.runtime.cuda_graphs import graph_of


class Replay:
    """`update(tokens)` of a minibatch int64 `[n, window_tokens]`, which returns losses float32 `[n]` and calls
    `live.backward` once, with `objective`.

    `due`: the update is to be captured before it is called for the first time. Minibatches of another shape than the
    one captured are updated by plain calls, and so are compiled passes, which torch 2.11 does not capture, and updates
    that ranks share, whose gradients are added up on the way. A model that cannot be captured has a note in the record.
    """

    def __init__(
        self, live: Training, objective: Objective, update: Callable[[Tensor], Tensor], graph: bool = True
    ) -> None:
        self.live, self.objective, self.update = live, objective, update
        self.due = graph and live.bundle.device.type == "cuda" and live.capturable
        self.graph: torch.cuda.CUDAGraph | None = None

    def capture(self, tokens: Tensor) -> None:
        """Capture the update, by trial updates with `tokens`; the caller sees to it that these change nothing."""
        self.due = False
        self.tokens = tokens.clone()
        with self.live.uncounted():
            self.graph = captured(self.live, self._hold)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Update by a minibatch, whose tokens are counted; return its losses, float32 `[n]`."""
        if self.graph is None or self.tokens.shape != tokens.shape:
            return self.update(tokens)
        self.tokens.copy_(tokens)
        self.graph.replay()
        self.live.count(tokens.numel(), self.objective)
        return self.losses

    def _hold(self) -> None:
        self.losses = self.update(self.tokens)


def captured(live: Training, work: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
    """Return a CUDA graph of `work`, or None with a note in the record if there is none."""
    try:
        return graph_of(work)
    except RuntimeError as error:  # the model synchronises with the device, as routers do
        live.task.notes["cuda graph"] = f"none: {first_line(error)}"
        return None
