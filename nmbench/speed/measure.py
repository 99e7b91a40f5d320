"""From a model to a speed report: prune by magnitude, prove 2:4, convert, time. All device code is behind `Hardware`.

Speed does not depend on which weights are kept, so the mask is the cheapest one: the largest magnitudes. Dense products
are timed with the weights as they were loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nmbench.errors import NMBenchError
from nmbench.models.bundle import Bundle
from nmbench.pattern import Pattern
from nmbench.runtime.dtypes import dtype_name
from nmbench.runtime.sparse24 import install, shared_inputs
from nmbench.runtime.sparse24.forms import CUSPARSELT
from nmbench.speed.alternatives import alternatives
from nmbench.speed.hardware import Hardware
from nmbench.speed.prefill import FEW, convertible, prefills
from nmbench.speed.pruning import HARDWARE_PATTERN, checked, product_call, prune, random_inputs
from nmbench.speed.report import Model, Product, Report
from nmbench.speed.times import Times
from nmbench.speed.whole_model import Key, Sizes, prefill_call, whole_model

WARM_UP, REPEAT = 10, 100
FULL = Sizes()
PRODUCTS, MODEL, PREFILL = "products", "model", "prefill"


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
    parts: Collection[str] = (PRODUCTS, MODEL),
    merged: bool = False,
) -> Report:
    """Time every shape at every number of tokens, then the whole model at `sizes`. The model is left pruned.

    `parts`: which of `PRODUCTS`, `MODEL` and `PREFILL`. `merged`: the sparse whole model has one product for layers
    that read one input. `report` receives one line of progress per measurement. Raises `NMBenchError` for a pattern
    that the hardware cannot multiply, `NotStrict` for weights that break the pattern, and `NumericalFailure` if a
    sparse product is wrong.
    """
    check_pattern(pattern)
    dtype = dtype_name(bundle.dtype)
    products = list(products_of(bundle, pattern, tokens, hardware, report)) if PRODUCTS in parts else []
    dense_bytes, dense = hardware.allocated(), {}
    if MODEL in parts:
        report("the whole model, dense")
        dense = whole_model(bundle, hardware, sizes)
    profile = prefills(bundle, pattern, sizes, hardware, report) if PREFILL in parts else []
    converted, models = 0, []
    if MODEL in parts:
        report("the whole model, sparse" + ", merged" * merged)
        converted = convert_merged(bundle, pattern, hardware) if merged else convert_all(bundle, pattern, hardware)
        models = models_of(bundle, hardware, sizes, dense, dense_bytes)
    environment = {**hardware.environment, "dtype": dtype, "merged": merged}
    return Report(bundle.ref, str(pattern), environment, converted, len(bundle.layers), products, models, profile)


def products_of(
    bundle: Bundle, pattern: Pattern, tokens: Sequence[int], hardware: Hardware, report: Callable[[str], None]
) -> Iterator[Product]:
    """The products of every shape at every number of tokens."""
    for shape in shapes_of(bundle):
        report(f"{shape.count} layers of {shape.outputs} x {shape.inputs}")
        for count in tokens:
            yield product_of(bundle, shape, pattern, count, hardware)


def models_of(
    bundle: Bundle, hardware: Hardware, sizes: Sizes, dense: Mapping[Key, Times], dense_bytes: int
) -> list[Model]:
    """Time the whole model, which is sparse now, beside the dense times."""
    sparse_bytes, sparse = hardware.allocated(), whole_model(bundle, hardware, sizes)
    return [Model(*key, times, sparse[key], dense_bytes, sparse_bytes) for key, times in dense.items() if key in sparse]


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
        alternatives=alternatives(inputs, weight, pruned, hardware),
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


def convert_merged(bundle: Bundle, pattern: Pattern, hardware: Hardware) -> int:
    """Convert the layers as `convert_all` does, with one product for those that read one input; return their number.

    Raises `NMBenchError` if the hardware has no such product.
    """
    form = hardware.form(CUSPARSELT)
    if isinstance(form, str):
        raise NMBenchError(f"--merged needs products by cuSPARSELt: {form}; leave --merged out.")
    layers = convertible(bundle, hardware)
    groups = shared_inputs({name: layer.module for name, layer in layers.items()}, prefill_call(bundle, FEW))
    for group in groups:
        install(bundle.model, group, [prune(layers[name].read(), pattern, name) for name in group], form)
        for name in group:  # the bundle still holds the layer; its dense weight can go
            layers[name].module.register_parameter("weight", None)
    return sum(map(len, groups))


def shape_of(weight: Tensor) -> tuple[int, int]:
    return (weight.shape[0], weight.shape[1])
