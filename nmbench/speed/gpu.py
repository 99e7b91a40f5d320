"""NVIDIA's sparse tensor cores through torch: cuSPARSELt, or CUTLASS where torch was built without it.

`torch.sparse.to_sparse_semi_structured` returns a tensor subclass that compresses the weight, and `F.linear` dispatches
on that subclass. Times are those of CUDA events around one call. A large buffer is written before each call. The writes
empty the second level cache, so that weights come from memory as in a model. The writes are repeated until the device
stays busy while the host launches the call (half a millisecond for cuSPARSELt), so that launch times do not count.
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

from nmbench.errors import NMBenchError, first_line
from nmbench.experiment.environment import version
from nmbench.pattern import Pattern
from nmbench.runtime.cuda_graphs import graph_of
from nmbench.runtime.dtypes import dtype_name
from nmbench.runtime.packed import pack
from nmbench.runtime.packed.launch import product, program_of
from nmbench.runtime.sparse24 import Form, forms
from nmbench.speed.hardware import Packed
from nmbench.speed.prefill_report import Kernel
from nmbench.speed.preload import loaded_path, loaded_version

FLUSH_BYTES = 2**30
HEAD_START = 2.0  # seconds of buffer writes before a call, as a multiple of the seconds of its launch
KERNEL_NAME = 100  # characters of a kernel's name that are kept
MULTIPLES = {"cusparselt": (16, 16), "cutlass": (32, 64)}  # required of rows and columns, in half precision
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
            **(cusparselt_in_use() if self.library == "cusparselt" else {"cusparselt": None}),
            "transformers": version("transformers"),
            "torchao": version("torchao"),
        }
        self._forms: dict[str, Form | str] = {}

    def problem(self, shape: tuple[int, int]) -> str | None:
        rows, columns = MULTIPLES[self.library]
        if shape[0] % rows or shape[1] % columns:
            return f"{self.library} needs multiples of {rows} outputs and {columns} inputs; the layers stay dense"
        return None

    def convert(self, weight: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*prototype stage.*")
            return torch.sparse.to_sparse_semi_structured(weight)

    def backend(self, sparse: Tensor) -> str:
        return str(getattr(sparse, "BACKEND", type(sparse).__name__))

    def packed(self, inputs: Tensor, weight: Tensor, pattern: Pattern) -> Packed | None:
        packed = pack(weight, pattern)
        program = program_of(packed, inputs)
        if program is None:
            return None
        return Packed(torch.inference_mode()(lambda: product(packed, inputs, None, program)), packed.bytes)

    def bytes(self, weight: Tensor) -> int:
        parts = [getattr(weight, name, None) for name in ("packed", "meta")]
        stored = [part for part in parts if isinstance(part, Tensor)] or [weight]
        return sum(part.numel() * part.element_size() for part in stored)

    def times(self, call: Callable[[], Any], warm_up: int, repeat: int) -> list[float]:
        for _ in range(warm_up):
            call()
        passes = 1 + math.ceil(HEAD_START * self.launch(call) / self._flush_seconds)
        return [self._timed(call, passes) for _ in range(repeat)]

    def launch(self, call: Callable[[], Any], count: int = 5) -> float:
        return statistics.median(launch_seconds(call) for _ in range(count))

    def graphed(self, call: Callable[[], Any]) -> Callable[[], Any] | None:
        try:
            with torch.inference_mode():
                return graph_of(call).replay
        except RuntimeError as error:
            self.environment["no_graph"] = first_line(error)
            torch.cuda.synchronize()
            return None

    def kernels(self, call: Callable[[], Any]) -> list[str]:
        ran = sorted(self._ran(call), key=lambda event: -event.time_range.elapsed_us())
        return list(dict.fromkeys(event.name[:KERNEL_NAME] for event in ran))

    def kernel_times(self, call: Callable[[], Any]) -> list[Kernel]:
        totals: dict[str, tuple[float, int]] = {}
        for event in self._ran(call):
            seconds, count = totals.get(event.name[:KERNEL_NAME], (0.0, 0))
            totals[event.name[:KERNEL_NAME]] = (seconds + event.time_range.elapsed_us() / 1e6, count + 1)
        found = [Kernel(name, *total) for name, total in totals.items()]
        return sorted(found, key=lambda kernel: -kernel.seconds)

    def form(self, name: str) -> Form | str:
        if name not in self._forms:
            self._forms[name] = forms.problem_of(name) or forms.FORMS[name]
        return self._forms[name]

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def allocated(self) -> int:
        return torch.cuda.memory_allocated() - self._flush.numel()

    def _ran(self, call: Callable[[], Any]) -> list[Any]:
        """The profiler's events of the kernels that a call runs."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the profiler warns where it cannot record kernels; the list is then empty
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
                call()
                torch.cuda.synchronize()
        return [event for event in found.events() or () if event.device_type.name == "CUDA"]

    def _timed(self, call: Callable[[], Any], passes: int) -> float:
        """Seconds of device time of one call, after `passes` writes of the large buffer."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(passes):
            self._flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000  # milliseconds


def launch_seconds(call: Callable[[], Any]) -> float:
    """Seconds until a call returns to the host, beginning with an idle device."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cusparselt_in_use() -> dict[str, Any]:
    """The release of cuSPARSELt that is loaded, its path, and the release that torch was compiled for."""
    path = loaded_path()
    return {
        "cusparselt": loaded_version(),
        "cusparselt_path": str(path) if path else None,
        "cusparselt_compiled_for": torch.backends.cusparselt.version(),
    }


def library() -> str:
    """The library that multiplies 2:4 weights on this machine. Raises `NMBenchError` with the reason if none does."""
    needed = "2:4 products need an NVIDIA GPU of compute capability 8.0 or newer and a torch with cuSPARSELt"
    if not torch.cuda.is_available():
        raise NMBenchError(f"{needed}; torch {torch.__version__} sees no CUDA GPU.")
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        raise NMBenchError(f"{needed}; {torch.cuda.get_device_name()} has {major}.{minor}.")
    if torch.backends.cusparselt.is_available():
        return "cusparselt"
    if major == 8:  # torch compiles its CUTLASS kernels for 8.x only
        return "cutlass"
    raise NMBenchError(f"{needed}; torch {torch.__version__} was built without cuSPARSELt.")


def half(name: str | None) -> str:
    """`name`, or bfloat16 for None. Raises `NMBenchError` unless `name` is a half-precision dtype."""
    known = [dtype_name(dtype) for dtype in HALF]
    if name not in (None, *known):
        raise NMBenchError(f"--dtype {name} is not one that sparse tensor cores multiply here: {' or '.join(known)}.")
    return name or "bfloat16"
