"""Work recorded once as a CUDA graph and replayed: no launch overhead, nothing waits for the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WARM_UPS = 3  # kernels are compiled, libraries set up, before a graph can be recorded


def graph_of(work: Callable[[], Any], undo: Callable[[], Any] = lambda: None) -> torch.cuda.CUDAGraph:
    """What replays all that `work` launches on the current device.

    It is run a few times before, with `undo` after each; recording itself computes nothing. The graph knows addresses,
    not tensors: whoever replays it keeps alive all that `work` reads and writes. Raises `RuntimeError` if the work does
    what a graph cannot hold, such as to wait for the device.
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
