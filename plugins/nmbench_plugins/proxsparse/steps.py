"""Updates of the masters: a step of Adam, then the proximal operator.

On a CUDA device the pass through the model and Adam are a CUDA graph, replayed. The operator looks at its data, so it
runs by itself, on all layers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import nmbench
from nmbench.evaluation import Objective
from nmbench.pruning import Replay, pace_of
from nmbench_plugins.proxsparse.masters import BETAS, Masters

if TYPE_CHECKING:
    from nmbench.pruning import Training


class Steps:
    """Updates of `masters`, which are the live weights of the model during an update."""

    def __init__(self, live: Training, masters: Masters, objective: Objective, graph: bool = True) -> None:
        self.live, self.masters, self.objective = live, masters, objective
        self.pace = torch.zeros(4, device=live.bundle.device)  # of Adam
        self.replay = Replay(live, objective, self._update, graph)

    def take(self, tokens: Tensor, step: int, rate: float, lam: Mapping[nmbench.Pattern, float]) -> Tensor:
        """Update by a minibatch `[n, window_tokens]`; return the objective by window before it, float32 `[n]`."""
        if self.replay.due:
            self.pace.zero_()  # an update changes nothing
            self.replay.capture(tokens)
        self.pace.copy_(torch.tensor(pace_of(rate, step, BETAS)))
        losses = self.replay(tokens)
        self.masters.penalise(lam)
        return losses

    def _update(self, tokens: Tensor) -> Tensor:
        for name, master in self.masters.layers.items():
            self.live.write(name, master)
        losses = self.live.backward(tokens, self.objective)
        for name in self.masters.layers:
            self.masters.update(name, self.live.gradient(name).float(), self.pace)
        return losses
