"""What `nmbench speed` asks of a device: `gpu` answers for NVIDIA, the tests for a fake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from nmbench.pattern import Pattern
from nmbench.runtime.sparse24 import Form
from nmbench.speed.prefill_report import Kernel


class Packed(NamedTuple):
    """A product with a weight in nmbench's packed form, and the bytes of that form."""

    call: Callable[[], Tensor]
    bytes: int


class Hardware(Protocol):
    """A device and library that multiply sparse matrices; `environment` describes both in the report."""

    environment: dict[str, Any]

    def problem(self, shape: tuple[int, int]) -> str | None:
        """The reason why a weight of `shape` `[out, in]` cannot be converted, or None if the weight can."""

    def convert(self, weight: Tensor) -> Tensor:
        """The sparse form of a contiguous weight `[out, in]` that is already 2:4."""

    def backend(self, sparse: Tensor) -> str:
        """The name of the library that multiplies a converted weight."""

    def packed(self, inputs: Tensor, weight: Tensor, pattern: Pattern) -> Packed | None:
        """A product of inputs `[tokens, in]` and a pruned weight in packed form; None where there is none."""

    def bytes(self, weight: Tensor) -> int:
        """Bytes of device memory of a weight, converted or dense."""

    def times(self, call: Callable[[], Any], warm_up: int, repeat: int) -> list[float]:
        """Seconds of device time of each of `repeat` calls, with cold caches and without launch times."""

    def launch(self, call: Callable[[], Any], count: int = 5) -> float:
        """Median seconds until a call returns to the host, of `count` calls."""

    def graphed(self, call: Callable[[], Any]) -> Callable[[], Any] | None:
        """A call that repeats the work of `call`, launched at once; None if that work cannot be recorded."""

    def kernels(self, call: Callable[[], Any]) -> list[str]:
        """Names of the kernels that a call runs, longest running time first; empty if none were recorded."""

    def kernel_times(self, call: Callable[[], Any]) -> list[Kernel]:
        """The kernels that a call runs, longest total first; empty if none were recorded."""

    def form(self, name: str) -> Form | str:
        """The form `name` of `runtime.sparse24.forms`, or why there is none on this device."""

    def synchronize(self) -> None:
        """Wait until the device is done."""

    def allocated(self) -> int:
        """Bytes currently allocated on the device."""
