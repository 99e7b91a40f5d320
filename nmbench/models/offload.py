"""Models larger than the device: decoder blocks stay on the host, and each comes to the device while it works.

Everything outside the blocks, and buffers, stay on the device. The same kernels see the same numbers as if the whole
model were there, so results are the same, bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Streaming:
    """Streams the `blocks` of `model`: a forward pass brings each to `device` and drops its copy afterwards.

    `present` holds the blocks that are on the device now, by id.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
        self.device = device
        self.present: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}  # parameters with their place on the host
        self._held: set[int] = set()
        blocks = list(blocks)
        streamed = {id(parameter) for block in blocks for parameter in block.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in streamed:
                parameter.data = parameter.data.to(device)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        for block in blocks:
            block.register_forward_pre_hook(arriving(self))
            block.register_forward_hook(leaving(self), always_call=True)
        self._blocks = {id(block) for block in blocks}

    @contextlib.contextmanager
    def holding(self, block: nn.Module) -> Iterator[None]:
        """While the context is open, a block is on the device; afterwards the host has what became of its weights."""
        self.bring(block)
        self._held.add(id(block))
        try:
            yield
        finally:
            self._held.discard(id(block))
            for parameter, home in self.present.get(id(block), ()):
                home.copy_(parameter.data)
            self.drop(block)

    def bring(self, block: nn.Module) -> None:
        """Copy a block to the device, unless it is there, or none that is streamed."""
        if id(block) in self._blocks and id(block) not in self.present:
            self.present[id(block)] = [(parameter, parameter.data) for parameter in block.parameters()]
            for parameter in block.parameters():
                parameter.data = parameter.data.to(self.device, copy=True)

    def drop(self, block: nn.Module) -> None:
        """Forget the copy on the device, unless the block is held."""
        if id(block) not in self._held:
            for parameter, home in self.present.pop(id(block), ()):
                parameter.data = home


def arriving(streaming: Streaming) -> Any:
    """A hook; a function, because a copy of a module copies what is bound to its hooks."""
    return lambda block, args: streaming.bring(block)


def leaving(streaming: Streaming) -> Any:
    return lambda block, args, output: streaming.drop(block)


def unhooked(model: nn.Module) -> nn.Module:
    """A model without the hooks of streaming, which a copy of it has inherited."""
    for module in model.modules():
        for table in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(table.items()):
                if getattr(hook, "__module__", "") == __name__:
                    del table[key]
    return model
