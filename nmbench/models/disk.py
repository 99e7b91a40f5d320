"""Weights of decoder blocks that stay on disk: dense ones, which nothing writes to, and changed ones beside them.

Dense weights that a file holds as they are, in the dtype of the run, are views of that file. All others, such as those
that were cast, fused from several tensors or merged with an adapter, are written to a temporary file once. Before a
block is written to, its weights move to another temporary file. To restore the dense weights, the parameters become
views of the dense ones again, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from nmbench.models.mapped import Maps, Place, places


class Disk:
    """The parameters of `blocks`, which are views of files from now on.

    `dense`: id of a parameter -> its dense weight, read-only. `in_files` and `in_copies`: bytes of dense weights in
    the files of the model, and of those in a temporary file. Raises `CannotWrite` if the disk lacks space.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        self.maps = Maps()
        self.dense: dict[int, Tensor] = {}
        self.in_files = self.in_copies = 0
        self._changing: dict[int, list[Tensor]] = {}  # id of a block -> the places of its changed weights
        self._changed: set[int] = set()  # ids of blocks whose parameters are there now
        blocks = list(blocks)
        self._room = max(sum(parameter.nbytes for parameter in block.parameters()) for block in blocks)
        every = [parameter for block in blocks for parameter in block.parameters()]
        found = dict(zip(map(id, every), places(every), strict=True))
        for block in blocks:
            parameters = [p for p in block.parameters() if id(p) not in self.dense]
            self._place(parameters, [found[id(parameter)] for parameter in parameters])

    @torch.no_grad()
    def _place(self, parameters: Sequence[nn.Parameter], found: Sequence[Place | None]) -> None:
        """Make parameters views of the files that hold them, or of a new one."""
        others = [parameter for parameter, place in zip(parameters, found, strict=True) if place is None]
        copies = iter(self.maps.temporary(others) if others else ())
        for parameter, place in zip(parameters, found, strict=True):
            view = next(copies).copy_(parameter) if place is None else self.maps.stored(place, parameter)
            self.in_copies += view.nbytes * (place is None)
            self.in_files += view.nbytes * (place is not None)
            parameter.data = self.dense[id(parameter)] = view
            self.release(view)

    def release(self, tensor: Tensor) -> None:
        """Give back the memory of a view of these files; other tensors stay as they are."""
        self.maps.release(tensor)

    def announce(self, tensor: Tensor) -> None:
        """Let the system read a view of these files ahead. Raises `ModelChanged` if a file of the model has changed."""
        self.maps.check_unchanged()
        self.maps.announce(tensor)

    def read(self, tensor: Tensor, into: Tensor) -> None:
        """Copy a weight into host memory."""
        self.maps.read(tensor, into)

    def kept(self, tensors: Sequence[Tensor], parts: Callable[[Tensor], Iterable[Tensor]]) -> list[Tensor]:
        """Return copies of tensors in a temporary file, which take no memory; `parts`: as `Maps.packed` wants them.

        The file is as large as the largest block, or as `tensors`. Its space is free when all tensors in it are.
        """
        return self.maps.packed(tensors, self._room, parts)

    @torch.no_grad()
    def open(self, block: nn.Module) -> None:
        """Let the parameters of a block, which is not on the device, be written to."""
        if id(block) in self._changed:
            return
        parameters = list(block.parameters())
        if id(block) not in self._changing:
            self._changing[id(block)] = self.maps.temporary(parameters)
        for parameter, place in zip(parameters, self._changing[id(block)], strict=True):
            before = parameter.data
            parameter.data = place
            parameter.detach().copy_(before)  # a write to the parameter, which copies made ahead of it do not have
            self.release(before)
        self._changed.add(id(block))

    def put_back(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make parameters, none of which is on the device, the dense weights again."""
        for parameter in parameters:
            if (dense := self.dense.get(id(parameter))) is not None and parameter.data_ptr() != dense.data_ptr():
                self.release(parameter.data)
                parameter.data = dense
        self._changed.clear()
