"""From a model to a speed report: prune by magnitude, prove 2:4, convert, time. Knows no device; `Hardware` does.

Which weights are kept does not matter to the speed, so the mask is the quickest one. Dense products are timed with the
weights as they were loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmbench.errors import NMBenchError, NotStrict, NumericalFailure
from nmbench.models.bundle import Bundle
from nmbench.pattern import Pattern
from nmbench.speed.report import Model, Product, Report, Times
from nmbench.speed.whole_model import whole_model

HARDWARE_PATTERN = Pattern(2, 4)
MOST_ERROR = 0.05  # relative, of a sparse product; rounding of bfloat16 is far below it, a wrong product far above
WARM_UP, REPEAT = 10, 100


class Hardware(Protocol):
    """What multiplies sparse matrices. `environment` is what the report says of it."""

    environment: dict[str, Any]

    def problem(self, shape: tuple[int, int]) -> str | None:
        """Why a weight `[out, in]` of that shape cannot be converted, or None."""

    def convert(self, weight: Tensor) -> Tensor:
        """The sparse form of a contiguous weight `[out, in]` that is 2:4 already."""

    def backend(self, sparse: Tensor) -> str:
        """Names the library that multiplies a converted weight."""

    def bytes(self, weight: Tensor) -> int:
        """What a weight, converted or not, takes in memory."""

    def times(self, call: Callable[[], Any], warm_up: int, repeat: int) -> list[float]:
        """Seconds that the device is busy with each of `repeat` calls, caches cold, launch times hidden."""

    def launch(self, call: Callable[[], Any]) -> float:
        """Seconds until a call returns to the host."""

    def graphed(self, call: Callable[[], Any]) -> Callable[[], Any] | None:
        """What does the work of a call again, launched at once; None if it cannot be recorded."""

    def kernels(self, call: Callable[[], Any]) -> list[str]:
        """The kernels that a call runs, longest first; empty if they cannot be told."""

    def synchronize(self) -> None:
        """Wait until the device is done."""

    def allocated(self) -> int:
        """Bytes allocated on the device now."""


@dataclass(frozen=True)
class Shape:
    """Layers of one shape: their number and the name of the first."""

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
) -> Report:
    """Time every shape at every number of tokens, then the whole model. The model is left sparse.

    Raises `NMBenchError` for a pattern that the hardware does not know, `NotStrict` for weights that break it, and
    `NumericalFailure` if a sparse product is wrong.
    """
    check_pattern(pattern)
    products = []
    for shape in shapes_of(bundle):
        report(f"{shape.count} layers of {shape.outputs} x {shape.inputs}")
        products += [product_of(bundle, shape, pattern, count, hardware) for count in tokens]
    report("the whole model, dense")
    dense_bytes, dense = hardware.allocated(), whole_model(bundle, hardware)
    converted = convert_all(bundle, pattern, hardware)
    report("the whole model, sparse")
    sparse_bytes, sparse = hardware.allocated(), whole_model(bundle, hardware)
    models = [
        Model(*key, times, sparse[key], dense_bytes, sparse_bytes) for key, times in dense.items() if key in sparse
    ]
    environment = {**hardware.environment, "dtype": str(bundle.dtype).removeprefix("torch.")}
    return Report(bundle.ref, str(pattern), environment, converted, len(bundle.layers), products, models)


def check_pattern(pattern: Pattern) -> None:
    """Raise `NMBenchError` unless every 4 consecutive weights keep at most 2, which is what the hardware multiplies."""
    if pattern.keep > HARDWARE_PATTERN.keep or pattern.group % HARDWARE_PATTERN.group:
        raise NMBenchError(
            f"sparse tensor cores multiply 2:4 (at most 2 of every 4 consecutive weights), and {pattern} need not be; "
            f"give --pattern 2:4 or, sparser still, 1:4 or 2:8."
        )


def shapes_of(bundle: Bundle) -> list[Shape]:
    """The distinct shapes of the prunable layers, most weights in all first."""
    found: dict[tuple[int, int], list[str]] = {}
    for name, layer in bundle.layers.items():
        found.setdefault(layer.shape, []).append(name)
    shapes = [Shape(*shape, len(names), names[0]) for shape, names in found.items()]
    return sorted(shapes, key=lambda shape: -shape.outputs * shape.inputs * shape.count)


def product_of(bundle: Bundle, shape: Shape, pattern: Pattern, tokens: int, hardware: Hardware) -> Product:
    """One weight with `tokens` random inputs: dense, then pruned and converted."""
    weight = bundle.layers[shape.example].read()
    inputs = random_inputs(tokens, weight)
    dense_call = multiplying(inputs, weight)
    dense = Times.of(hardware.times(dense_call, WARM_UP, REPEAT))
    found: dict[str, Any] = dict.fromkeys(("sparse", "sparse_launch", "backend", "sparse_bytes", "relative_error"))
    found["sparse_kernels"] = []
    problem = hardware.problem(shape_of(weight))
    if problem is None:
        pruned = prune(weight, pattern, shape.example)
        sparse = hardware.convert(pruned)
        call = multiplying(inputs, sparse)
        found = {
            "relative_error": checked(call(), multiplying(inputs, pruned)(), shape.example),
            "sparse": Times.of(hardware.times(call, WARM_UP, REPEAT)),
            "sparse_launch": hardware.launch(call),
            "backend": hardware.backend(sparse),
            "sparse_bytes": hardware.bytes(sparse),
            "sparse_kernels": hardware.kernels(call),
        }
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
        **found,
    )


def prune(weight: Tensor, pattern: Pattern, name: str) -> Tensor:
    """A contiguous copy of a weight `[out, in]` with the largest of every group kept, proven to fit the hardware."""
    pruned = weight.masked_fill(~pattern.top(weight.abs()), 0.0).contiguous()
    check_fits(pruned, name)
    return pruned


def check_fits(weight: Tensor, name: str) -> None:
    """Raise `NotStrict` naming the first 4 weights of which more than 2 are not zero: a conversion would drop some."""
    kept = HARDWARE_PATTERN.kept(weight != 0)
    broken = (kept > HARDWARE_PATTERN.keep).nonzero()
    if len(broken):
        row, group = broken[0].tolist()
        raise NotStrict(
            f"{name} is not 2:4: {len(broken)} of {kept.numel()} groups; first: row {row}, columns {4 * group}.."
            f"{4 * group + 3} keep {int(kept[row, group])} instead of at most 2; it was not converted."
        )


def checked(sparse: Tensor, dense: Tensor, name: str) -> float:
    """The relative difference of two products. Raises `NumericalFailure` if they are not the same product."""
    error = float((sparse.float() - dense.float()).norm() / dense.float().norm())
    if not error <= MOST_ERROR:
        raise NumericalFailure(f"the sparse product of {name} differs from the dense one by {error:.3g}, relative.")
    return error


def multiplying(inputs: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """A call that multiplies `[tokens, in]` by a weight `[out, in]` of any kind: `[tokens, out]`."""

    @torch.inference_mode()
    def call() -> Tensor:
        return F.linear(inputs, weight)

    return call


def random_inputs(tokens: int, weight: Tensor) -> Tensor:
    """Standard normal inputs `[tokens, in]`, in dtype and on the device of the weight."""
    generator = torch.Generator(weight.device).manual_seed(0)
    shape = (tokens, weight.shape[1])
    return torch.randn(shape, generator=generator, device=weight.device, dtype=torch.float32).to(weight.dtype)


def convert_all(bundle: Bundle, pattern: Pattern, hardware: Hardware) -> int:
    """Make every linear layer that can be sparse so, in place; how many there were."""
    converted = 0
    for name, layer in bundle.layers.items():
        linear = isinstance(layer.module, nn.Linear)  # a Conv1D multiplies from the other side
        if linear and hardware.problem(layer.shape) is None:
            sparse = hardware.convert(prune(layer.read(), pattern, name))
            layer.module.weight = nn.Parameter(sparse, requires_grad=False)
            converted += 1
    return converted


def shape_of(weight: Tensor) -> tuple[int, int]:
    return (weight.shape[0], weight.shape[1])
