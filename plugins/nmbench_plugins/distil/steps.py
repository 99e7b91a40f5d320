"""Updates of the masters by Adam; on a CUDA device one update of a whole minibatch is a CUDA graph, replayed.

Small models are bound by the time that launching kernels takes. The graph does the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nmbench.evaluation import Objective
from nmbench.pruning import Replay
from nmbench_plugins.distil.masters import Masters

if TYPE_CHECKING:
    from nmbench.pruning import Training

BETAS = (0.9, 0.95)


class Steps:
    """Updates of `masters`, whose masked values are the live weights of the model."""

    def __init__(
        self, live: Training, masters: Masters, objective: Objective, decay: float, graph: bool = True
    ) -> None:
        self.live, self.masters, self.objective, self.decay = live, masters, objective, decay
        device = live.bundle.device
        self.cuda = device.type == "cuda"
        self.rate = torch.zeros((), device=device)
        chosen = {"lr": self.rate, "fused": True, "capturable": True} if self.cuda else {}
        parameters = list(masters.tensors.values())
        self.optimiser = torch.optim.Adam(parameters, betas=BETAS, **chosen)  # type: ignore[arg-type]
        for parameter in parameters:  # moments exist from the beginning, so that a checkpoint can be put into them
            step = torch.zeros((), device=device) if self.cuda else torch.zeros(())
            moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            self.optimiser.state[parameter] = {"step": step, **moments}
        self.replay = Replay(live, objective, self._update, graph)
        self.write()

    def take(self, tokens: Tensor, rate: float) -> Tensor:
        """Update the masters by a minibatch `[n, window_tokens]`; return the objective by window, float32 `[n]`."""
        if self.replay.due:
            self._capture(tokens)
        self.rate.fill_(rate)
        if not self.cuda:
            self.optimiser.param_groups[0]["lr"] = rate
        return self.replay(tokens)

    def write(self) -> None:
        """Make the masked masters the live weights."""
        for name in self.masters.tensors:
            self.live.write(name, self.masters.masked(name))

    def moments(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Return the optimiser's state by layer, for a checkpoint."""
        return {name: dict(self.optimiser.state[master]) for name, master in self.masters.tensors.items()}

    def restore(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on with the state of a checkpoint, in place, and with the masters as they are now."""
        for name, master in self.masters.tensors.items():
            for key, value in self.optimiser.state[master].items():
                value.copy_(moments[name][key])
        self.write()

    def _update(self, tokens: Tensor) -> Tensor:
        losses = self.live.backward(tokens, self.objective)
        for name, master in self.masters.tensors.items():
            master.grad = self.masters.gradient(name, self.live.gradient(name), self.decay)
        self.optimiser.step()
        self.write()
        return losses

    def _capture(self, tokens: Tensor) -> None:
        """Capture an update with step size 0; the state of the optimiser is put back afterwards."""
        self.rate.fill_(0.0)
        before = {name: {k: v.clone() for k, v in state.items()} for name, state in self.moments().items()}
        try:
            self.replay.capture(tokens)
        finally:
            self.restore(before)
