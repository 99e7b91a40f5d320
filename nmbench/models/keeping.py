"""Results of layers on their way to where they wait: a thread brings them there while the next layers are made."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import cached_property
from types import TracebackType

import torch
from torch import Tensor

from nmbench.methods import Pruned
from nmbench.models.bit_equality import as_bytes
from nmbench.models.bundle import Bundle

PART = 2**26  # bytes that leave a GPU at once, through a buffer in pinned memory


class Keeping:
    """The pruned layers of a model, by name, as a context manager.

    They stay as they are, unless blocks are streamed: then a thread brings them to the host, or to its disk if that is
    where the blocks are. As long as they are under way, they take no more bytes of the device than the masks of the
    largest block, or than one result if that is larger.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="nmbench-keeping") if bundle.streaming else None
        self._results: dict[str, Pruned | Future[Pruned]] = {}
        self._under_way: deque[tuple[Future[Pruned], int]] = deque()

    def __enter__(self) -> Keeping:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def take(self, name: str, pruned: Pruned) -> None:
        """Take the result of a layer, which nobody changes any more. Raises what the thread raised before."""
        if self._thread is None:
            self._results[name] = pruned
            return
        ready = self._now() if pruned.mask.device.type == "cuda" else None
        self._results[name] = bringing = self._thread.submit(self._brought, pruned, ready)
        self._under_way.append((bringing, sum(tensor.nbytes for tensor in result_tensors(pruned))))
        while len(self._under_way) > 1 and sum(size for _, size in self._under_way) > self._room:
            self._under_way.popleft()[0].result()

    def layers(self) -> dict[str, Pruned]:
        """Return all results, once they are where they wait. Raises `CannotWrite` if the disk lacks space."""
        return {name: it.result() if isinstance(it, Future) else it for name, it in self._results.items()}

    @cached_property
    def _room(self) -> int:
        """The bytes of the masks of the largest block."""
        return max(block_weights(self.bundle))

    def _now(self) -> torch.cuda.Event:
        """An event that has passed when all that has been asked of the GPU until now is done."""
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self.bundle.device))
        return event

    @torch.no_grad()
    def _brought(self, pruned: Pruned, ready: torch.cuda.Event | None) -> Pruned:
        """Return the result with its tensors where they wait; runs in the thread."""
        disk, tensors = self.bundle.disk, result_tensors(pruned)
        with nullcontext() if ready is None else torch.cuda.stream(self._stream):
            if ready is not None:
                ready.synchronize()
            mask, *weight = disk.kept(tensors, self._parts) if disk else map(self._on_host, tensors)
        return dataclasses.replace(pruned, mask=mask, weight=weight[0] if weight else None)

    def _on_host(self, tensor: Tensor) -> Tensor:
        if tensor.device == self.bundle.host:
            return tensor
        found = torch.empty(tensor.shape, dtype=tensor.dtype)
        for place, part in zip(as_bytes(found).split(PART), self._parts(tensor), strict=True):
            place.copy_(part)
        return found

    def _parts(self, tensor: Tensor) -> Iterator[Tensor]:
        """Yield the bytes of a tensor on the host, uint8 `[n]`; the memory of a part is that of the next one too."""
        for part in as_bytes(tensor).split(PART):
            if part.device.type == "cuda":
                self._buffer[: len(part)].copy_(part, non_blocking=True)
                self._stream.synchronize()
                part = self._buffer[: len(part)]
            yield part

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.bundle.device)

    @cached_property
    def _buffer(self) -> Tensor:
        return torch.empty(PART, dtype=torch.uint8, pin_memory=True)


def result_tensors(pruned: Pruned) -> list[Tensor]:
    """Return the mask of a result, and its weight if it has one."""
    return [pruned.mask] if pruned.weight is None else [pruned.mask, pruned.weight]


def block_weights(bundle: Bundle) -> list[int]:
    """Return the number of prunable weights of every block."""
    blocks = range(len(bundle.blocks))
    return [sum(math.prod(layer.shape) for layer in bundle.block_layers(index)) for index in blocks]
