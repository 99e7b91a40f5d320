"""Ranks that are threads of the test, or processes that it starts as torchrun does."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmbench.runtime.ranks import Ranks


class Exchange:
    """What `size` threads give each other."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.values: list[Any] = [None] * size

    def all_of(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


class ThreadRanks(Ranks):
    """A rank that is a thread."""

    def __init__(self, rank: int, exchange: Exchange) -> None:
        super().__init__(len(exchange.values), rank)
        self.exchange = exchange

    def gathered(self, values: Tensor, count: int) -> Tensor:
        found = torch.cat(self.exchange.all_of(self.rank, values.clone()))
        assert len(found) == count
        return found

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        found = self.exchange.all_of(self.rank, [tensor.clone() for tensor in tensors])
        for tensor, parts in zip(tensors, zip(*found, strict=True), strict=True):
            tensor.copy_(sum(parts[1:], parts[0].clone()))

    def broadcast(self, tensor: Tensor, source: int) -> None:
        tensor.copy_(self.exchange.all_of(self.rank, tensor.clone())[source])

    def _exchanged(self, value: Any) -> list[Any]:
        return self.exchange.all_of(self.rank, value)


def by_threads(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work(ranks)` returns on each of `size` ranks; a rank that fails ends the others."""
    exchange = Exchange(size)

    def one(rank: int) -> Any:
        try:
            return work(ThreadRanks(rank, exchange))
        except BaseException:
            exchange.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(one, rank) for rank in range(size)]
    failures = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(failures, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]


def started(python: Any, size: int, cwd: Path, *command: str) -> list[Any]:
    """Programs, one for each rank, with the variables of torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    common |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        python.start(*command, cwd=cwd, env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(size)
    ]
