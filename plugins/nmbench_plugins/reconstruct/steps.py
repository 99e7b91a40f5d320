"""Updates of the kept weights of a part by Adam; on a CUDA device one update is a CUDA graph, replayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import nmbench
from nmbench.pruning import PartReplay, squared_errors

BETAS = (0.9, 0.95)


class Steps:
    """Updates of `masters`, float32 by name; gradients of weights that `masks` drop are zero, so that they stay zero.

    `targets`: the outputs that each batch of `part` should have.
    """

    def __init__(
        self,
        part: nmbench.Part,
        targets: Sequence[Tensor],
        masters: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
    ) -> None:
        self.masters, self.masks = masters, masks
        device = next(iter(masters.values())).device
        self.cuda = device.type == "cuda"
        self.rate = torch.zeros((), device=device)
        chosen = {"lr": self.rate, "fused": True, "capturable": True} if self.cuda else {}
        self.optimiser = torch.optim.Adam(list(masters.values()), betas=BETAS, **chosen)  # type: ignore[arg-type]
        self.replay = PartReplay(part, targets, self._update)
        if self.replay.due:
            self._capture()

    def take(self, number: int, rate: float) -> None:
        """Update the masters by batch `number`."""
        self.rate.fill_(rate)
        if not self.cuda:
            self.optimiser.param_groups[0]["lr"] = rate
        self.replay(number)

    def _update(self, part: nmbench.Part, number: int, target: Tensor) -> None:
        self.optimiser.zero_grad()
        squared_errors(part, number, target, self.masters).mean().backward()
        for name, mask in self.masks.items():
            gradient = self.masters[name].grad
            assert gradient is not None
            gradient.mul_(mask)
        self.optimiser.step()

    def _capture(self) -> None:
        """Capture one update, with step size 0; the masters do not change, and moments begin at 0 again."""
        try:
            self.replay.capture()
        finally:
            self.optimiser.zero_grad()
            for state in self.optimiser.state.values():
                for value in state.values():
                    value.zero_()
