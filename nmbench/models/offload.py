"""Models larger than the device: decoder blocks stay on the host, and each is copied to the device to compute.

The host keeps them in memory or, for models that are larger than that too, on disk (`nmbench.models.disk`). Buffers,
and all parameters outside the blocks, stay on the device. The kernels and their inputs are those of a model that is
wholly on the device, so results are equal bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nmbench.models.disk import Disk
from nmbench.models.prefetch import HostMemory, Prefetch, Traffic


class Streaming:
    """Offloading of the `blocks` of `model`: hooks copy a block to `device` for its forward pass, then drop it.

    `device`: where blocks compute, with its index. `present`: id of each block that is on the device now -> its
    parameters with their tensors on the host. `disk`: where the blocks are if `from_disk`. Blocks from the disk, and
    all blocks for a GPU, are read ahead by a thread. `room`: bytes of the device that passes may take while they wait
    (`nmbench.calibration.waiting`); None: a part of those that are free.
    """

    def __init__(
        self, model: nn.Module, blocks: Iterable[nn.Module], device: torch.device, from_disk: bool = False
    ) -> None:
        self.device = device = torch.empty(0, device=device).device  # with its index: "cuda" does not equal "cuda:0"
        self.present: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}
        self.room: int | None = None
        self._held: set[int] = set()
        blocks = list(blocks)
        streamed = {id(parameter) for block in blocks for parameter in block.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in streamed:
                parameter.data = parameter.data.to(device, copy=from_disk)  # a view of a file would keep it mapped
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device, copy=from_disk))
        self.disk = Disk(blocks) if from_disk else None
        for block in blocks:
            block.register_forward_pre_hook(bring_hook(self))
            block.register_forward_hook(drop_hook(self), always_call=True)
        self._blocks = {id(block): after for block, after in zip(blocks, [*blocks[1:], blocks[0]], strict=True)}
        ahead = from_disk or device.type == "cuda"
        self._prefetch = Prefetch(device, self.disk or HostMemory()) if ahead else None

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
            changed = [] if undo else [(p, p.data) for p, _ in self.present.get(id(block), ())]
            self.drop(block)
            if changed:
                self.open(block)
            for parameter, values in changed:
                parameter.detach().copy_(values)

    def bring(self, block: nn.Module) -> None:
        """Copy a block to the device, unless the block is not offloaded or is on the device already."""
        if id(block) in self._blocks and id(block) not in self.present:
            copies = self._copies(block)
            self.present[id(block)] = [(parameter, parameter.data) for parameter in block.parameters()]
            for parameter, copy in zip(block.parameters(), copies, strict=True):
                parameter.data = copy

    def _copies(self, block: nn.Module) -> list[Tensor]:
        if self._prefetch is not None:
            following = self._blocks[id(block)]
            return self._prefetch.fetch(block, None if id(following) in self.present else following)
        return [parameter.data.to(self.device, copy=True) for parameter in block.parameters()]

    def drop(self, block: nn.Module) -> None:
        """Release the copy on the device, unless the block is held."""
        if id(block) not in self._held:
            for parameter, on_host in self.present.pop(id(block), ()):
                parameter.data = on_host

    def open(self, block: nn.Module) -> None:
        """Let the weights of a block be written to: on disk, those of a block that is not on the device are moved."""
        if self.disk is not None and id(block) not in self.present:
            self.disk.open(block)

    def release(self, tensor: Tensor) -> None:
        """Give back the host memory of a weight on disk; other tensors stay as they are."""
        if self.disk is not None:
            self.disk.release(tensor)

    def traffic(self) -> Traffic | None:
        """Return what was moved since the last call; None if nothing is read ahead."""
        if self._prefetch is None:
            return None
        found, self._prefetch.traffic = self._prefetch.traffic, Traffic()
        return found


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
