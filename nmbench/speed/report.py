"""The measurements of `nmbench speed`, as plain data and as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nmbench.speed.prefill_report import Prefill, prefill_lines, speedup
from nmbench.speed.times import UNSTEADY, Times, verdict

MEBIBYTE = 2**20
SLOW_RELEASES = ("0.8.0",)  # of cuSPARSELt


@dataclass(frozen=True)
class Alternative:
    """A product in another form; `problem` says why there is none. `launch` is in seconds of the host."""

    form: str
    times: Times | None = None
    problem: str | None = None
    launch: float | None = None
    relative_error: float | None = None
    kernels: Sequence[str] = ()


@dataclass(frozen=True)
class Product:
    """`tokens` inputs times one weight `[outputs, inputs]`, dense and sparse; `count` layers have that shape.

    `sparse` is None where the weight cannot be converted, and `problem` gives the reason. `packed` is the product with
    nmbench's packed form, None where there is no program for it, as for many tokens. `alternatives` are other forms of
    a product of many tokens. `relative_error` is the Frobenius norm of the difference of the sparse and the dense
    product of the same pruned weight, relative to the norm of the dense one. `dense_launch` and `sparse_launch` are
    seconds of the host. Kernel names come from the profiler; empty where the profiler recorded none.
    """

    outputs: int
    inputs: int
    count: int
    example: str
    tokens: int
    dense: Times
    dense_launch: float
    problem: str | None
    dense_bytes: int
    dense_kernels: Sequence[str]
    sparse: Times | None = None
    sparse_launch: float | None = None
    backend: str | None = None
    sparse_bytes: int | None = None
    relative_error: float | None = None
    sparse_kernels: Sequence[str] = ()
    packed: Times | None = None
    packed_bytes: int | None = None
    alternatives: Sequence[Alternative] = ()

    @property
    def speedup(self) -> float | None:
        """Dense time divided by sparse time: above 1 sparse is faster."""
        return self.dense.median / self.sparse.median if self.sparse else None

    @property
    def packed_speedup(self) -> float | None:
        """Dense time divided by the time with packed weights."""
        return self.dense.median / self.packed.median if self.packed else None

    @property
    def bytes_bound(self) -> float | None:
        """The speedup that bytes allow where a product waits for memory: packed weights, inputs and outputs."""
        if self.packed_bytes is None:
            return None
        vectors = self.tokens * (self.inputs + self.outputs) * self.dense_bytes // (self.inputs * self.outputs)
        return (self.dense_bytes + vectors) / (self.packed_bytes + vectors)


@dataclass(frozen=True)
class Model:
    """Times of a whole model at one task; a step reads `tokens` new tokens of each of `batch` sequences.

    `launch` is "eager", or "graph" for one CUDA graph.
    """

    task: str
    batch: int
    tokens: int
    launch: str
    dense: Times
    sparse: Times
    dense_bytes: int
    sparse_bytes: int

    @property
    def speedup(self) -> float:
        return self.dense.median / self.sparse.median

    def tokens_per_second(self, times: Times) -> float:
        return self.batch * self.tokens / times.median


@dataclass(frozen=True)
class Report:
    """All measurements. Of `layers` prunable layers, `converted` are sparse in the whole-model figures."""

    model: str
    pattern: str
    environment: Mapping[str, Any]
    converted: int
    layers: int
    products: Sequence[Product]
    models: Sequence[Model]
    prefill: Sequence[Prefill] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, with speedups and tokens per second."""
        content = dataclasses.asdict(self)
        for product, plain in zip(self.products, content["products"], strict=True):
            plain |= {name: getattr(product, name) for name in ("speedup", "packed_speedup", "bytes_bound")}
            for other, row in zip(product.alternatives, plain["alternatives"], strict=True):
                row["speedup"] = speedup(product.dense, other.times)
        for model, plain in zip(self.models, content["models"], strict=True):
            plain["speedup"] = model.speedup
            for kind in ("dense", "sparse"):
                plain[f"{kind}_tokens_per_second"] = model.tokens_per_second(getattr(model, kind))
        content["prefill"] = [one.to_dict(self.prefill[0]) for one in self.prefill]
        return content


def render(report: Report) -> str:
    """The report as text for a terminal: products by shape, then the whole model, then the kernels dispatched."""
    parts = [*product_lines(report), *doubts(report.environment), *model_lines(report), *prefill_lines(report.prefill)]
    return "\n".join([*parts, *(["Kernels dispatched", *kernels(report.products)] if report.products else [])])


def product_lines(report: Report) -> list[str]:
    """The header, the table of products, the table of their other forms, and why there are none."""
    import pandas

    where = f"{report.model}, {report.pattern}, {report.environment['device_name']}, {report.environment['dtype']}"
    if not report.products:
        return [where]
    others = [other_row(product, other) for product in report.products for other in product.alternatives if other.times]
    reasons = {other.form: other.problem for p in report.products for other in p.alternatives if other.problem}
    return [
        f"{where}; medians of {report.products[0].dense.n} times on the device, "
        f"caches cold; '?': quartiles over {UNSTEADY:.0%} apart",
        pandas.DataFrame([product_row(product) for product in report.products]).to_string(index=False),
        *dict.fromkeys(f"  {p.outputs} x {p.inputs}: {p.problem}" for p in report.products if p.problem),
        *(["Other forms at prefill", pandas.DataFrame(others).to_string(index=False)] if others else []),
        *(f"  {form}: {reason}" for form, reason in reasons.items()),
    ]


def model_lines(report: Report) -> list[str]:
    """The table of the whole model."""
    import pandas

    if not report.models:
        return []
    return [
        f"Whole model, {report.converted} of {report.layers} prunable layers sparse, launch times included",
        pandas.DataFrame([model_row(model) for model in report.models]).to_string(index=False),
    ]


def doubts(environment: Mapping[str, Any]) -> list[str]:
    """What the environment makes doubtful: a release of cuSPARSELt that its vendor calls slow on some GPUs."""
    if environment.get("cusparselt") not in SLOW_RELEASES:
        return []
    return [
        "DOUBT: cuSPARSELt 0.8.0 is loaded, which its vendor says is slow on H100 and L4; measure again with a "
        "newer one: --cusparselt FOLDER (package nvidia-cusparselt-cu12 or -cu13)."
    ]


def product_row(product: Product) -> dict[str, str]:
    sparse, packed = product.sparse, product.packed
    return {
        "weight": f"{product.outputs} x {product.inputs}",
        "layers": str(product.count),
        "as": product.example.rpartition(".")[2],
        "tokens": str(product.tokens),
        "dense us": f"{product.dense.median * 1e6:.1f}",
        "sparse us": f"{sparse.median * 1e6:.1f}" if sparse else "-",
        "sparse is": verdict(product.speedup, product.dense, sparse),
        "packed us": f"{packed.median * 1e6:.1f}" if packed else "-",
        "packed is": verdict(product.packed_speedup, product.dense, packed) if packed else "-",
        "bytes bound": f"{product.bytes_bound:.2f} x" if product.bytes_bound else "-",
        "launch us": " / ".join(f"{one * 1e6:.0f}" for one in (product.dense_launch, product.sparse_launch) if one),
        "dense MiB": f"{product.dense_bytes / MEBIBYTE:.2f}",
        "sparse MiB": "-" if product.sparse_bytes is None else f"{product.sparse_bytes / MEBIBYTE:.2f}",
        "rel. error": "-" if product.relative_error is None else f"{product.relative_error:.1e}",
    }


def other_row(product: Product, other: Alternative) -> dict[str, str]:
    assert other.times and other.relative_error is not None and other.launch is not None
    return {
        "weight": f"{product.outputs} x {product.inputs}",
        "tokens": str(product.tokens),
        "form": other.form,
        "us": f"{other.times.median * 1e6:.1f}",
        "is": verdict(speedup(product.dense, other.times), product.dense, other.times),
        "launch us": f"{other.launch * 1e6:.0f}",
        "rel. error": f"{other.relative_error:.1e}",
    }


def model_row(model: Model) -> dict[str, str]:
    return {
        "task": model.task,
        "batch": str(model.batch),
        "launch": model.launch,
        "dense tokens/s": f"{model.tokens_per_second(model.dense):.0f}",
        "sparse tokens/s": f"{model.tokens_per_second(model.sparse):.0f}",
        "sparse is": verdict(model.speedup, model.dense, model.sparse),
        "dense MiB": f"{model.dense_bytes / MEBIBYTE:.0f}",
        "sparse MiB": f"{model.sparse_bytes / MEBIBYTE:.0f}",
    }


def kernels(products: Sequence[Product]) -> list[str]:
    """One line for every backend and set of kernels that a product ran."""
    lines: dict[str, None] = {}
    for product in products:
        for kind, names in ((product.backend, product.sparse_kernels), ("dense", product.dense_kernels)):
            if kind:
                lines[f"  {kind}: {', '.join(names) or 'the profiler recorded none'}"] = None
    return sorted(lines)
