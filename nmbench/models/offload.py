"""Models larger than the device: decoder blocks stay on the host, and each is copied to the device to compute.

Buffers, and all parameters outside the blocks, stay on the device. The kernels and their inputs are those of a model
that is wholly on the device, so results are equal bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Streaming:
    """Offloading of the `blocks` of `model`: hooks copy a block to `device` for its forward pass, then drop it.

    `device`: where blocks compute, with its index. `present`: id of each block that is on the device now -> its
    parameters with their tensors on the host.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
        self.device = device = torch.empty(0, device=device).device  # with its index: "cuda" does not equal "cuda:0"
        self.present: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}
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
            block.register_forward_pre_hook(bring_hook(self))
            block.register_forward_hook(drop_hook(self), always_call=True)
        self._blocks = {id(block) for block in blocks}

    @contextlib.contextmanager
    def holding(self, block: nn.Module, undo: bool = False) -> Iterator[None]:
        """Keep a block on the device while the context is open; then copy its weights back to the host.

        With `undo` they are not copied, so that the block has the weights of before again.
        """
        self.bring(block)
        self._held.add(id(block))
        try:
            yield
        finally:
            self._held.discard(id(block))
            for parameter, on_host in self.present.get(id(block), ()) if not undo else ():
                on_host.copy_(parameter.data)
            self.drop(block)

    def bring(self, block: nn.Module) -> None:
        """Copy a block to the device, unless the block is not offloaded or is on the device already."""
        if id(block) in self._blocks and id(block) not in self.present:
            self.present[id(block)] = [(parameter, parameter.data) for parameter in block.parameters()]
            for parameter in block.parameters():
                parameter.data = parameter.data.to(self.device, copy=True)

    def drop(self, block: nn.Module) -> None:
        """Release the copy on the device, unless the block is held."""
        if id(block) not in self._held:
            for parameter, on_host in self.present.pop(id(block), ()):
                parameter.data = on_host


def bring_hook(streaming: Streaming) -> Any:
    """Return a forward pre-hook that brings the block: a function, because copying a module copies bound methods."""
    return lambda block, args: streaming.bring(block)


def drop_hook(streaming: Streaming) -> Any:
    """Return a forward hook that drops the block."""
    return lambda block, args, output: streaming.drop(block)


def unhooked(model: nn.Module) -> nn.Module:
    """Remove the hooks of offloading, which a copied model inherits, from `model`; return it."""
    for module in model.modules():
        for table in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(table.items()):
                if getattr(hook, "__module__", "") == __name__:
                    del table[key]
    return model
