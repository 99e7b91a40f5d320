"""Updates of the kept weights of a part by Adam; on a CUDA device one update is a CUDA graph, replayed.

Blocks of small models are bound by the time that launching kernels takes. The graph does the same arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import nmbench
from nmbench.pruning import StaticCall
from nmbench.runtime import graph_of

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
        graph: bool = True,
    ) -> None:
        self.part, self.targets, self.masters, self.masks = part, targets, masters, masks
        device = next(iter(masters.values())).device
        self.cuda = device.type == "cuda"
        self.rate = torch.zeros((), device=device)
        chosen = {"lr": self.rate, "fused": True, "capturable": True} if self.cuda else {}
        self.optimiser = torch.optim.Adam(list(masters.values()), betas=BETAS, **chosen)  # type: ignore[arg-type]
        self.graph = self._captured() if self.cuda and graph else None

    def take(self, number: int, rate: float) -> None:
        """Update the masters by batch `number`."""
        self.rate.fill_(rate)
        if not self.cuda:
            self.optimiser.param_groups[0]["lr"] = rate
        call, target = self.part.calls[number], self.targets[number]
        if self.graph is None or not self.static.takes(call) or target.shape != self.target.shape:
            self._update(self.part, number, target)
            return
        self.static.load(call)
        self.target.copy_(target)
        self.graph.replay()
        self.part.count(number)

    def _update(self, part: nmbench.Part, number: int, target: Tensor) -> None:
        self.optimiser.zero_grad()
        squares(part, number, target, self.masters).mean().backward()
        for name, mask in self.masks.items():
            gradient = self.masters[name].grad
            assert gradient is not None
            gradient.mul_(mask)
        self.optimiser.step()

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        """Return the graph of one update, or None if the part cannot be captured; the masters do not change."""
        self.static = StaticCall(self.part.calls[0], self.rate.device)
        self.target = self.targets[0].to(self.rate.device, copy=True)
        tally = dataclasses.replace(self.part.tally)  # of its own: captures are not counted
        part = dataclasses.replace(self.part, calls=[self.static], tally=tally)
        try:
            return graph_of(lambda: self._update(part, 0, self.target))  # with step size 0
        except RuntimeError:  # the block synchronises with the device, as routers do
            return None
        finally:
            self.optimiser.zero_grad()
            for state in self.optimiser.state.values():
                for value in state.values():
                    value.zero_()


def squares(part: nmbench.Part, number: int, target: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the squared errors of a batch in float32, of the shape of the outputs."""
    output = part.outputs(number, tensors)
    return (output.float() - target.to(output.device).float()).square()
