"""CUDA graphs: work captured once and replayed without launch overhead and without synchronising with the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WARM_UPS = 3  # runs that compile kernels and set up libraries before a capture


def graph_of(work: Callable[[], Any], undo: Callable[[], Any] = lambda: None) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of all kernels that `work` launches on the current device.

    `work` first runs `WARM_UPS` times, each followed by `undo`; the capture itself computes nothing. The graph holds
    addresses, not tensors: the caller keeps all tensors that `work` reads and writes alive. Raises `RuntimeError` if
    `work` does something that a graph cannot hold, such as to synchronise with the device.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            try:
                work()
            finally:
                undo()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the device
        work()
    return graph
