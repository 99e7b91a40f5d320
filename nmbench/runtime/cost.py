"""The cost of a job: tokens, wall-clock seconds and peak memory."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import TracebackType

import psutil
import torch


@dataclass
class Cost:
    """Tokens of a method: passed forward and backward, distinct calibration tokens (`unique_tokens`), and distinct
    tokens of the selection windows (`selection_tokens`).
    """

    forward_tokens: int = 0
    backward_tokens: int = 0
    unique_tokens: int = 0
    selection_tokens: int = 0

    def include(self, start: Cost) -> None:
        """Add the cost of the `start` mask; distinct tokens, which both read, become the larger count."""
        self.forward_tokens += start.forward_tokens
        self.backward_tokens += start.backward_tokens
        self.unique_tokens = max(self.unique_tokens, start.unique_tokens)
        self.selection_tokens = max(self.selection_tokens, start.selection_tokens)


@dataclass(frozen=True)
class Spent:
    """Wall-clock `seconds`, and processor seconds of all threads of the process; None: unknown."""

    seconds: float = 0.0
    cpu_seconds: float | None = 0.0

    @classmethod
    def now(cls) -> Spent:
        """The clocks; the difference of two readings is the time spent between them."""
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: Spent) -> Spent:
        """Return the time from the reading `start` to this one."""
        assert self.cpu_seconds is not None and start.cpu_seconds is not None
        return Spent(self.seconds - start.seconds, self.cpu_seconds - start.cpu_seconds)

    def __add__(self, other: Spent) -> Spent:
        known = self.cpu_seconds is not None and other.cpu_seconds is not None
        return Spent(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds if known else None)  # type: ignore[operator]


NOTHING = Spent()


class Meter:
    """Meter of a `with` block.

    `spent`: wall-clock and processor seconds. `host_bytes`: peak resident memory of the process, sampled every 20 ms.
    `device_bytes`: the peak that torch allocated on a CUDA device, None elsewhere. `host_growth`: the peak over the
    resident memory at the beginning. `cpu_share`: processor seconds of the process per wall-clock second.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spent = Spent()
        self.host_bytes = 0
        self.host_growth = 0
        self.device_bytes: int | None = None
        self.cpu_share: float | None = None

    def __enter__(self) -> Meter:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._stop = threading.Event()
        self._resident = psutil.Process().memory_info().rss
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        self._start = Spent.now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.device_bytes = torch.cuda.max_memory_allocated(self.device)
        self.spent = Spent.now().since(self._start)
        assert self.spent.cpu_seconds is not None
        self.cpu_share = self.spent.cpu_seconds / max(self.spent.seconds, 1e-9)
        self._stop.set()
        self._thread.join()
        self.host_growth = max(0, self.host_bytes - self._resident)

    def _sample(self) -> None:
        process = psutil.Process()
        while True:
            self.host_bytes = max(self.host_bytes, process.memory_info().rss)
            if self._stop.wait(0.02):
                return
