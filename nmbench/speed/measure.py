"""From a model to a speed report: prune by magnitude, prove 2:4, convert, time. All device code is behind `Hardware`.

Speed does not depend on which weights are kept, so the mask is the cheapest one: the largest magnitudes. Dense products
are timed with the weights as they were loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmbench.errors import NMBenchError, NotStrict, NumericalFailure
from nmbench.models.bundle import Bundle
from nmbench.pattern import Pattern
from nmbench.runtime.dtypes import dtype_name
from nmbench.speed.report import Model, Product, Report, Times
from nmbench.speed.whole_model import Sizes, whole_model

HARDWARE_PATTERN = Pattern(2, 4)
MOST_ERROR = 0.05  # relative, of a sparse product; rounding to bfloat16 stays far below, a wrong product far above
WARM_UP, REPEAT = 10, 100
FULL = Sizes()


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

    def launch(self, call: Callable[[], Any]) -> float:
        """Seconds until a call returns to the host."""

    def graphed(self, call: Callable[[], Any]) -> Callable[[], Any] | None:
        """A call that repeats the work of `call`, launched at once; None if that work cannot be recorded."""

    def kernels(self, call: Callable[[], Any]) -> list[str]:
        """Names of the kernels that a call runs, longest running time first; empty if none were recorded."""

    def synchronize(self) -> None:
        """Wait until the device is done."""

    def allocated(self) -> int:
        """Bytes currently allocated on the device."""


@dataclass(frozen=True)
class Shape:
    """The layers of one shape `[outputs, inputs]`: `count` of them, the first named `example`."""

    outputs: int
    inputs: int
    count: int
    example: str


def measure(
    bundle: Bundle,
    pattern: Pattern,
    tokens: Sequence[int],
    hardware: Hardware,
    report: Callable[[str], None] = lambda line: None,
    sizes: Sizes = FULL,
) -> Report:
    """Time every shape at every number of tokens, then the whole model at `sizes`. The model is left sparse.

    `report` receives one line of progress per measurement. Raises `NMBenchError` for a pattern that the hardware cannot
    multiply, `NotStrict` for weights that break the pattern, and `NumericalFailure` if a sparse product is wrong.
    """
    check_pattern(pattern)
    products = []
    for shape in shapes_of(bundle):
        report(f"{shape.count} layers of {shape.outputs} x {shape.inputs}")
        products += [product_of(bundle, shape, pattern, count, hardware) for count in tokens]
    report("the whole model, dense")
    dense_bytes, dense = hardware.allocated(), whole_model(bundle, hardware, sizes)
    converted = convert_all(bundle, pattern, hardware)
    report("the whole model, sparse")
    sparse_bytes, sparse = hardware.allocated(), whole_model(bundle, hardware, sizes)
    models = [
        Model(*key, times, sparse[key], dense_bytes, sparse_bytes) for key, times in dense.items() if key in sparse
    ]
    environment = {**hardware.environment, "dtype": dtype_name(bundle.dtype)}
    return Report(bundle.ref, str(pattern), environment, converted, len(bundle.layers), products, models)


def check_pattern(pattern: Pattern) -> None:
    """Raise `NMBenchError` unless `pattern` keeps at most 2 of any 4 consecutive weights, as the hardware needs."""
    if pattern.keep > HARDWARE_PATTERN.keep or pattern.group % HARDWARE_PATTERN.group:
        raise NMBenchError(
            f"sparse tensor cores multiply 2:4 (at most 2 of every 4 consecutive weights), and {pattern} need not be; "
            f"give --pattern 2:4 or, sparser still, 1:4 or 2:8."
        )


def shapes_of(bundle: Bundle) -> list[Shape]:
    """The distinct shapes of the prunable layers, sorted by total number of weights, largest first."""
    found: dict[tuple[int, int], list[str]] = {}
    for name, layer in bundle.layers.items():
        found.setdefault(layer.shape, []).append(name)
    shapes = [Shape(*shape, len(names), names[0]) for shape, names in found.items()]
    return sorted(shapes, key=lambda shape: -shape.outputs * shape.inputs * shape.count)


def product_of(bundle: Bundle, shape: Shape, pattern: Pattern, tokens: int, hardware: Hardware) -> Product:
    """Time one weight times `tokens` random inputs: dense, then pruned and converted."""
    weight = bundle.layers[shape.example].read()
    inputs = random_inputs(tokens, weight)
    pruned = prune(weight, pattern, shape.example)
    dense_call = product_call(inputs, weight)
    dense = Times.of(hardware.times(dense_call, WARM_UP, REPEAT))
    problem = hardware.problem(shape_of(weight))
    return Product(
        shape.outputs,
        shape.inputs,
        shape.count,
        shape.example,
        tokens,
        dense=dense,
        dense_launch=hardware.launch(dense_call),
        problem=problem,
        dense_bytes=hardware.bytes(weight),
        dense_kernels=hardware.kernels(dense_call),
        **(sparse_part(inputs, pruned, shape.example, hardware) if problem is None else {}),
        **packed_part(inputs, pruned, pattern, shape.example, hardware),
    )


def sparse_part(inputs: Tensor, pruned: Tensor, name: str, hardware: Hardware) -> dict[str, Any]:
    """What a `Product` says of a pruned weight on sparse tensor cores."""
    sparse = hardware.convert(pruned)
    call = product_call(inputs, sparse)
    return {
        "relative_error": checked(call(), product_call(inputs, pruned)(), name),
        "sparse": Times.of(hardware.times(call, WARM_UP, REPEAT)),
        "sparse_launch": hardware.launch(call),
        "backend": hardware.backend(sparse),
        "sparse_bytes": hardware.bytes(sparse),
        "sparse_kernels": hardware.kernels(call),
    }


def packed_part(inputs: Tensor, pruned: Tensor, pattern: Pattern, name: str, hardware: Hardware) -> dict[str, Any]:
    """What a `Product` says of a pruned weight in nmbench's packed form; nothing where no program multiplies it."""
    packed = hardware.packed(inputs, pruned, pattern)
    if packed is None:
        return {}
    checked(packed.call(), product_call(inputs, pruned)(), name)
    return {"packed": Times.of(hardware.times(packed.call, WARM_UP, REPEAT)), "packed_bytes": packed.bytes}


def prune(weight: Tensor, pattern: Pattern, name: str) -> Tensor:
    """A contiguous copy of a weight `[out, in]` that keeps the largest magnitudes of every group.

    Raises `NotStrict` if the copy is not 2:4, which the hardware multiplies.
    """
    pruned = weight.masked_fill(~pattern.top(weight.abs()), 0.0).contiguous()
    check_fits(pruned, name)
    return pruned


def check_fits(weight: Tensor, name: str) -> None:
    """Raise `NotStrict` naming the first 4 weights of which more than 2 are non-zero: a conversion would drop some."""
    kept = HARDWARE_PATTERN.kept(weight != 0)
    broken = (kept > HARDWARE_PATTERN.keep).nonzero()
    if len(broken):
        row, group = broken[0].tolist()
        raise NotStrict(
            f"{name} is not 2:4: {len(broken)} of {kept.numel()} groups; first: row {row}, columns {4 * group}.."
            f"{4 * group + 3} keep {int(kept[row, group])} instead of at most 2; it was not converted."
        )


def checked(sparse: Tensor, dense: Tensor, name: str) -> float:
    """The relative difference of two products (Frobenius norm). Raises `NumericalFailure` above `MOST_ERROR`."""
    error = float((sparse.float() - dense.float()).norm() / dense.float().norm())
    if not error <= MOST_ERROR:
        raise NumericalFailure(f"the sparse product of {name} differs from the dense one by {error:.3g}, relative.")
    return error


def product_call(inputs: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """A call that multiplies inputs `[tokens, in]` by a weight `[out, in]`, dense or sparse: `[tokens, out]`."""

    @torch.inference_mode()
    def call() -> Tensor:
        return F.linear(inputs, weight)

    return call


def random_inputs(tokens: int, weight: Tensor) -> Tensor:
    """Standard normal inputs `[tokens, in]` in the dtype and on the device of `weight`."""
    generator = torch.Generator(weight.device).manual_seed(0)
    shape = (tokens, weight.shape[1])
    return torch.randn(shape, generator=generator, device=weight.device, dtype=torch.float32).to(weight.dtype)


def convert_all(bundle: Bundle, pattern: Pattern, hardware: Hardware) -> int:
    """Convert every linear layer that can be sparse, in place; return the number of converted layers."""
    converted = 0
    for name, layer in bundle.layers.items():
        linear = isinstance(layer.module, nn.Linear)  # Conv1D stores its weight [in, out]
        if linear and hardware.problem(layer.shape) is None:
            sparse = hardware.convert(prune(layer.read(), pattern, name))
            layer.module.weight = nn.Parameter(sparse, requires_grad=False)
            converted += 1
    return converted


def shape_of(weight: Tensor) -> tuple[int, int]:
    return (weight.shape[0], weight.shape[1])
