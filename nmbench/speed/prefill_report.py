"""The figures of a profiled prefill, as plain data and as rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nmbench.speed.times import Times, verdict

KERNELS = 12  # that are kept of each way, longest total first


@dataclass(frozen=True)
class Kernel:
    """All runs of one kernel in one call: seconds on the device in total, and how many."""

    name: str
    seconds: float
    count: int


@dataclass(frozen=True)
class Prefill:
    """The whole model's prefill of `tokens` tokens with one way of multiplying; `problem` says why there is none.

    `eager` and `graph` are seconds of a prefill launched kernel by kernel and as one CUDA graph. `products` are seconds
    of its `count` products alone, one graph too. `host` is seconds until an eager prefill returns to the host. `device`
    is seconds of the `launched` kernels of an eager prefill, of which the longest are listed. `relative_error` is the
    Frobenius norm of the difference of the last logits from those of dense products with the same weights, relative to
    the latter. `product_error` is the largest such difference of the outputs of one layer, given the same inputs.
    """

    way: str
    tokens: int
    problem: str | None = None
    count: int = 0
    eager: Times | None = None
    graph: Times | None = None
    products: Times | None = None
    host: float | None = None
    device: float | None = None
    launched: int = 0
    kernels: Sequence[Kernel] = ()
    relative_error: float | None = None
    product_error: float | None = None
    bytes: int | None = None

    @property
    def other(self) -> float | None:
        """Seconds of everything but products, launched at once."""
        return self.graph.median - self.products.median if self.graph and self.products else None

    @property
    def launches(self) -> float | None:
        """Seconds that launching kernel by kernel adds."""
        return self.eager.median - self.graph.median if self.graph and self.eager else None

    @property
    def best(self) -> Times | None:
        """The faster of the times eager and as one graph."""
        return min(filter(None, (self.eager, self.graph)), key=lambda times: times.median, default=None)

    def to_dict(self, dense: Prefill) -> dict[str, Any]:
        """Return the figures as plain data, with the parts of the time and the speedup over `dense`."""
        return {
            **dataclasses.asdict(self),
            "other": self.other,
            "launches": self.launches,
            "speedup": speedup(dense.best, self.best),
            "products_speedup": speedup(dense.products, self.products),
        }


def speedup(dense: Times | None, other: Times | None) -> float | None:
    """Return the time of `dense` divided by `other`'s; None if one is missing."""
    return dense.median / other.median if dense and other else None


def prefill_row(found: Prefill, dense: Prefill) -> dict[str, str]:
    """Return a row of the table: milliseconds of each part, and how it stands beside `dense`."""
    if found.problem:
        return {"way": found.way}
    return {
        "way": found.way,
        "products": str(found.count),
        "eager ms": milliseconds(found.eager),
        "graph ms": milliseconds(found.graph),
        "of that products": milliseconds(found.products),
        "other": milliseconds(found.other),
        "launches add": milliseconds(found.launches),
        "host ms": milliseconds(found.host),
        "kernels": str(found.launched),
        "is": verdict(speedup(dense.best, found.best), dense.best, found.best),
        "products are": verdict(speedup(dense.products, found.products), dense.products, found.products),
        "layers differ": "-" if found.product_error is None else f"{found.product_error:.1e}",
        "logits differ": "-" if found.relative_error is None else f"{found.relative_error:.1e}",
    }


def milliseconds(time: Times | float | None) -> str:
    seconds = time.median if isinstance(time, Times) else time
    return "-" if seconds is None else f"{seconds * 1e3:.1f}"


def prefill_lines(found: Sequence[Prefill]) -> list[str]:
    """Return the table of a profiled prefill, reasons, and the longest kernels of each way, as lines of text."""
    import pandas

    if not found:
        return []
    dense = found[0]
    table = pandas.DataFrame([prefill_row(one, dense) for one in found if not one.problem])
    return [
        f"Prefill of {dense.tokens} tokens, whole model, beside {dense.way}; 'is' compares the faster of eager and one "
        f"CUDA graph of both",
        table.to_string(index=False),
        *(f"  {one.way}: {one.problem}" for one in found if one.problem),
        "Kernels with the longest total",
        *(line for one in found for line in kernel_lines(one)),
    ]


def kernel_lines(found: Prefill) -> list[str]:
    """Return three lines for the three kernels with the longest total of a way."""
    return [
        f"  {found.way}: {kernel.seconds * 1e3:.1f} ms, {kernel.count} x {kernel.name}" for kernel in found.kernels[:3]
    ]
