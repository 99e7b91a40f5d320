"""NVIDIA's sparse tensor cores through torch: cuSPARSELt, or CUTLASS where torch was built without it.

`torch.sparse.to_sparse_semi_structured` returns a tensor subclass that compresses the weight; `F.linear` dispatches on
it. Times are those of CUDA events around one call. Before each call a large buffer is written: that empties the second
level cache, so weights come from memory as they do in a model. It is written as often as it takes to keep the device
busy while the host launches the call (cuSPARSELt takes the host half a millisecond), so launch times do not count.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from nmbench.errors import NMBenchError
from nmbench.runtime.cuda_graphs import graph_of

FLUSH_BYTES = 2**30
HEAD_START = 2.0  # the device is kept busy this many times the seconds that a launch takes
LAUNCHES = 5  # to find out how long that is
KERNEL_NAME = 100  # characters of a kernel's name that are kept
LEAST = {"cusparselt": (16, 16), "cutlass": (32, 64)}  # rows and columns must be multiples, for half precision
HALF = (torch.float16, torch.bfloat16)


class SparseTensorCores:
    """`Hardware` on the current CUDA device. Raises `NMBenchError` if it cannot multiply 2:4 weights."""

    def __init__(self) -> None:
        self.library = library()
        torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS = self.library == "cutlass"
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self._flush_seconds = statistics.median(self._timed(self._flush.zero_, 1) for _ in range(5))
        self.environment: dict[str, Any] = {
            "device_name": torch.cuda.get_device_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "library": self.library,
            "cusparselt": torch.backends.cusparselt.version() if self.library == "cusparselt" else None,
        }

    def problem(self, shape: tuple[int, int]) -> str | None:
        rows, columns = LEAST[self.library]
        if shape[0] % rows or shape[1] % columns:
            return f"{self.library} needs multiples of {rows} outputs and {columns} inputs; the layers stay dense"
        return None

    def convert(self, weight: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*prototype stage.*")
            return torch.sparse.to_sparse_semi_structured(weight)

    def backend(self, sparse: Tensor) -> str:
        return str(getattr(sparse, "BACKEND", type(sparse).__name__))

    def bytes(self, weight: Tensor) -> int:
        parts = [getattr(weight, name, None) for name in ("packed", "meta")]
        stored = [part for part in parts if isinstance(part, Tensor)] or [weight]
        return sum(part.numel() * part.element_size() for part in stored)

    def times(self, call: Callable[[], Any], warm_up: int, repeat: int) -> list[float]:
        for _ in range(warm_up):
            call()
        passes = 1 + math.ceil(HEAD_START * self.launch(call) / self._flush_seconds)
        return [self._timed(call, passes) for _ in range(repeat)]

    def launch(self, call: Callable[[], Any]) -> float:
        return statistics.median(launch_seconds(call) for _ in range(LAUNCHES))

    def graphed(self, call: Callable[[], Any]) -> Callable[[], Any] | None:
        try:
            with torch.inference_mode():
                return graph_of(call).replay
        except RuntimeError as error:
            self.environment["no_graph"] = str(error).splitlines()[0]
            torch.cuda.synchronize()
            return None

    def kernels(self, call: Callable[[], Any]) -> list[str]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the profiler warns of what it cannot see; then it names nothing
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
                call()
                torch.cuda.synchronize()
        ran = [event for event in found.events() or () if event.device_type.name == "CUDA"]
        ran.sort(key=lambda event: -event.time_range.elapsed_us())
        return list(dict.fromkeys(event.name[:KERNEL_NAME] for event in ran))

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def allocated(self) -> int:
        return torch.cuda.memory_allocated() - self._flush.numel()

    def _timed(self, call: Callable[[], Any], passes: int) -> float:
        """Seconds of the device for one call, after `passes` writes of the large buffer."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(passes):
            self._flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000  # milliseconds


def launch_seconds(call: Callable[[], Any]) -> float:
    """Seconds until a call returns to the host, the device being idle before."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def library() -> str:
    """What multiplies 2:4 weights here. Raises `NMBenchError` with the reason if nothing does."""
    needed = "2:4 products need an NVIDIA GPU of compute capability 8.0 or newer and a torch with cuSPARSELt"
    if not torch.cuda.is_available():
        raise NMBenchError(f"{needed}; torch {torch.__version__} sees no CUDA GPU.")
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        raise NMBenchError(f"{needed}; {torch.cuda.get_device_name()} has {major}.{minor}.")
    if torch.backends.cusparselt.is_available():
        return "cusparselt"
    if major == 8:  # the CUTLASS kernels of torch are made for 8.x only
        return "cutlass"
    raise NMBenchError(f"{needed}; torch {torch.__version__} was built without cuSPARSELt.")


def half(name: str | None) -> str:
    """`name` if it is a dtype that is multiplied in half precision, bfloat16 if there is none."""
    known = [str(dtype).removeprefix("torch.") for dtype in HALF]
    if name not in (None, *known):
        raise NMBenchError(f"--dtype {name} is not one that sparse tensor cores multiply here: {' or '.join(known)}.")
    return name or "bfloat16"
