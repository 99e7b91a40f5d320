"""An update of a part of the model by one batch; on a CUDA device it is captured as a CUDA graph once, and replayed.

Parts of small models are bound by the time that launching kernels takes. The graph does the same arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nmbench.pruning.block_parts import Part
from nmbench.pruning.static_call import StaticCall
from nmbench.runtime.cuda_graphs import graph_of

Update = Callable[[Part, int, Tensor], None]  # part, number of a batch, target


class PartReplay:
    """`update(part, number, target)` of the batches of `part`, which calls `part.outputs` once and goes backward once.

    `targets`: the outputs that each batch should have. `due`: the update is to be captured before it is called for the
    first time. Batches of another form than the captured one, and parts that cannot be captured, are updated by plain
    calls.
    """

    def __init__(self, part: Part, targets: Sequence[Tensor], update: Update, graph: bool = True) -> None:
        self.part, self.targets, self.update = part, targets, update
        self.device = next(part.module.parameters()).device
        self.due = graph and self.device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None

    def capture(self) -> None:
        """Capture the update by trial updates with the first batch; the caller sees to it that these change nothing."""
        self.due = False
        self.static = StaticCall(self.part.calls[0], self.device)
        self.target = self.targets[0].to(self.device, copy=True)
        tally = dataclasses.replace(self.part.tally)  # of its own: captures are not counted
        part = dataclasses.replace(self.part, calls=[self.static], tally=tally)
        try:
            self.graph = graph_of(lambda: self.update(part, 0, self.target))
        except RuntimeError:  # the block synchronises with the device, as routers do
            self.graph = None

    def __call__(self, number: int) -> None:
        """Update by batch `number`, whose tokens are counted."""
        call, target = self.part.calls[number], self.targets[number]
        if self.graph is None or not self.static.takes(call) or target.shape != self.target.shape:
            self.update(self.part, number, target)
            return
        self.static.load(call)
        self.target.copy_(target)
        self.graph.replay()
        self.part.count(number)
