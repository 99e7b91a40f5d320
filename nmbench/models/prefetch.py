"""Blocks that are read ahead: while one block computes, a thread reads the weights of the next into host memory."""

from __future__ import annotations

import mmap
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from nmbench.models.mapped import offsets_of, view


@dataclass
class Traffic:
    """What streaming has moved: blocks and their bytes, seconds of reading them, and seconds that work waited."""

    blocks: int = 0
    bytes: int = 0
    read: float = 0.0
    waited: float = 0.0

    @property
    def overlap(self) -> float:
        """The share of the reading that was done while another block was at work."""
        return max(0.0, 1 - self.waited / self.read) if self.read else 0.0


@dataclass(frozen=True)
class Ahead:
    """A block that is being read: what its parameters were when the reading began, and the copies to come."""

    block: nn.Module
    state: tuple[tuple[int, int], ...]
    copies: Future[list[Tensor]]


class Source(Protocol):
    """Where the weights of blocks are: the disk, or host memory."""

    def announce(self, tensor: Tensor) -> None:
        """Prepare to read a weight, before any other of its block is read."""

    def read(self, tensor: Tensor, into: Tensor) -> None:
        """Copy a weight into host memory."""

    def release(self, tensor: Tensor) -> None:
        """Give back what a weight took while it was read."""


class HostMemory:
    """Weights in host memory."""

    def announce(self, tensor: Tensor) -> None:
        """Do nothing."""

    def read(self, tensor: Tensor, into: Tensor) -> None:
        """Copy a weight."""
        into.copy_(tensor)

    def release(self, tensor: Tensor) -> None:
        """Do nothing."""


class Prefetch:
    """Copies of the weights of blocks on `device`, each read from `source` by a thread after the one before has been
    fetched.

    For a GPU there is one buffer in pinned memory, as large as the largest block so far.
    """

    def __init__(self, device: torch.device, source: Source) -> None:
        self.device, self.source = device, source
        self.traffic = Traffic()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="nmbench-prefetch")
        self._ahead: Ahead | None = None
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._sent: torch.cuda.Event | None = None  # the last copy from the buffer to the device

    def fetch(self, block: nn.Module, following: nn.Module | None) -> list[Tensor]:
        """Return copies of the parameters of `block` on the device; begin to read those of the block `following`."""
        ahead, self._ahead = self._ahead, None
        begin = time.perf_counter()
        if ahead is None or ahead.block is not block or ahead.state != state_of(block):
            if ahead is not None:
                wait([ahead.copies])  # for the buffer
            ahead = self._begin(block)
        copies = [self._to_device(tensor) for tensor in ahead.copies.result()]
        self.traffic.waited += time.perf_counter() - begin
        self.traffic.blocks += 1
        self.traffic.bytes += sum(copy.nbytes for copy in copies)
        if self.device.type == "cuda":
            self._sent = torch.cuda.Event()
            self._sent.record()
        if following is not None and following is not block:
            self._ahead = self._begin(following)
        return copies

    def _begin(self, block: nn.Module) -> Ahead:
        weights = [parameter.data for parameter in block.parameters()]
        return Ahead(block, state_of(block), self._thread.submit(self._read, weights, self._sent))

    @torch.no_grad()
    def _read(self, weights: Sequence[Tensor], sent: torch.cuda.Event | None) -> list[Tensor]:
        """Return copies of weights in host memory; runs in the thread."""
        for weight in weights:
            self.source.announce(weight)
        if sent is not None:
            sent.synchronize()
        begin = time.perf_counter()
        copies = self._slots(weights)
        for copy, weight in zip(copies, weights, strict=True):
            self.source.read(weight, copy)
            self.source.release(weight)
        self.traffic.read += time.perf_counter() - begin
        return copies

    def _slots(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors to read weights into: new ones on a CPU, for a GPU parts of the pinned buffer."""
        offsets, size = offsets_of(weights)
        if self.device.type != "cuda":
            memory = private_memory(size)
            return [view(memory, offset, weight) for offset, weight in zip(offsets, weights, strict=True)]
        buffer = self._pinned(size)
        parts = [buffer[at : at + weight.nbytes] for at, weight in zip(offsets, weights, strict=True)]
        return [part.view(weight.dtype).view(weight.shape) for part, weight in zip(parts, weights, strict=True)]

    def _pinned(self, size: int) -> Tensor:
        if self._buffer.numel() < size:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # freed before its successor is there
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return self._buffer

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


def private_memory(size: int) -> mmap.mmap:
    """Return memory of its own, which the system has back as soon as nobody needs it; of a heap that is not certain."""
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)


def state_of(block: nn.Module) -> tuple[tuple[int, int], ...]:
    """Return where the parameters of a block lie, and how often they were written to: another state, other weights."""
    return tuple((parameter.data_ptr(), parameter._version) for parameter in block.parameters())
