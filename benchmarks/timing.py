"""Seconds of repeated calls, on a GPU by events; used by the scripts beside it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch


def seconds(run: Callable[[], Any], repeats: int, device: torch.device, warm_up: int) -> list[float]:
    """Seconds of every repeat; on a GPU between events, without synchronisation between repeats."""
    for _ in range(warm_up):
        run()
    if device.type != "cuda":
        return [elapsed(run) for _ in range(repeats)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]


def elapsed(run: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
