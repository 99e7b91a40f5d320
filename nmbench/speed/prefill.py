"""Where the time of a whole model's prefill goes: products, everything else, launches; with each way of multiplying.

Every way puts its products into the same model, one after the other, so that all else is equal. First come dense ways
with the weights as they were loaded; then the weights are pruned in place, and sparse ways follow.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nmbench.errors import first_line
from nmbench.models.bundle import Bundle, Layer
from nmbench.pattern import Pattern
from nmbench.runtime.sparse24 import SharedProduct, multiplying, shared_inputs
from nmbench.runtime.sparse24.forms import (
    CUSPARSELT,
    DENSE,
    FP8,
    FP8_CUSPARSELT,
    FP8_CUTLASS,
    SEARCHED,
    TORCH,
    can_multiply,
    dense,
)
from nmbench.speed.hardware import Hardware
from nmbench.speed.prefill_report import KERNELS, Prefill
from nmbench.speed.pruning import difference, most_error, prune, random_inputs
from nmbench.speed.times import Times
from nmbench.speed.whole_model import Sizes, prefill_call, prefill_tokens, steps

WARM_UP, REPEAT, HOST = 1, 5, 2  # calls; the last are timed on the host
FEW = 16  # tokens of the pass that observes shared inputs


@dataclass(frozen=True)
class Way:
    """A form of `FORMS`, for every layer alone or `merged`: one product for layers that read the same input."""

    form: str
    merged: bool = True

    @property
    def name(self) -> str:
        return f"{self.form}, merged" if self.merged else self.form


DENSE_WAYS = (Way(DENSE, merged=False), Way(DENSE), Way(FP8))
SPARSE_WAYS = (
    Way(TORCH, merged=False),
    Way(CUSPARSELT, merged=False),
    Way(SEARCHED, merged=False),
    *(Way(form) for form in (CUSPARSELT, SEARCHED, FP8_CUTLASS, FP8_CUSPARSELT)),
)


def prefills(
    bundle: Bundle, pattern: Pattern, sizes: Sizes, hardware: Hardware, report: Callable[[str], None]
) -> list[Prefill]:
    """Profile a prefill with every way that begins in time. The model is left pruned, with dense layers.

    A way with a layer whose outputs are not those of the dense layer with the same weight has no figures.
    """
    began, tokens = time.monotonic(), prefill_tokens(bundle, sizes)
    layers = convertible(bundle, hardware)
    groups = shared_inputs({name: layer.module for name, layer in layers.items()}, prefill_call(bundle, FEW))
    call = torch.inference_mode()(prefill_call(bundle, tokens))
    found = []
    for ways in (DENSE_WAYS, SPARSE_WAYS):
        if ways is SPARSE_WAYS:
            prune_all(layers, pattern)
        reference = call().logits.clone()
        for way in ways:
            if time.monotonic() - began > sizes.prefill_seconds:
                found.append(Prefill(way.name, tokens, problem=f"not begun within {sizes.prefill_seconds:g} seconds"))
                continue
            report(f"a prefill of {tokens}, {way.name}")
            found.append(profiled(bundle, way, groups, layers, call, reference, tokens, hardware))
    return found


def convertible(bundle: Bundle, hardware: Hardware) -> dict[str, Layer]:
    """Return the layers that all ways can multiply, by the names of their modules."""
    names = {module: name for name, module in bundle.model.named_modules()}
    return {names[layer.module]: layer for layer in bundle.layers.values() if fits(layer, hardware)}


def fits(layer: Layer, hardware: Hardware) -> bool:
    linear = isinstance(layer.module, nn.Linear)
    return linear and can_multiply(*layer.shape) and hardware.problem(layer.shape) is None


def prune_all(layers: Mapping[str, Layer], pattern: Pattern) -> None:
    """Prune the layers in place, by magnitude."""
    for name, layer in layers.items():
        layer.write(prune(layer.read(), pattern, name))


def profiled(
    bundle: Bundle,
    way: Way,
    groups: Sequence[Sequence[str]],
    layers: Mapping[str, Layer],
    call: Callable[[], Any],
    reference: Tensor,
    tokens: int,
    hardware: Hardware,
) -> Prefill:
    """Return the figures of one way, or the reason why there are none."""
    form = hardware.form(way.form)
    if isinstance(form, str):
        return Prefill(way.name, tokens, problem=form)
    used = groups if way.merged else [[name] for group in groups for name in group]
    try:
        with installed(bundle, way, used, layers, form) as products:
            widths = [layers[group[0]].shape[1] for group in used]
            errors = errors_of(way, bundle, layers, call, reference)
            if isinstance(errors, str):
                return Prefill(way.name, tokens, problem=errors)
            figures = figures_of(call, product_calls(products, widths, tokens, bundle), hardware)
            return Prefill(way.name, tokens, count=len(products), bytes=hardware.allocated(), **errors, **figures)
    except RuntimeError as refused:  # a library or a device without the product
        return Prefill(way.name, tokens, problem=first_line(refused))


@contextlib.contextmanager
def installed(
    bundle: Bundle, way: Way, groups: Sequence[Sequence[str]], layers: Mapping[str, Layer], form: Any
) -> Iterator[list[SharedProduct]]:
    """In the context, the model multiplies in one way; plain dense products leave the model's own layers."""
    if way == DENSE_WAYS[0]:
        modules = [layers[name].module for (name,) in groups]
        yield [SharedProduct(dense(module.weight, module.bias)) for module in modules]  # type: ignore[arg-type]
        return
    with multiplying(bundle.model, groups, form, lambda name: layers[name].read()) as products:
        yield products


def errors_of(
    way: Way, bundle: Bundle, layers: Mapping[str, Layer], call: Callable[[], Any], reference: Tensor
) -> dict[str, Any] | str:
    """Return how far the layers and the logits of an installed way are from dense ones, or what is wrong.

    Every layer is judged alone, with the inputs that it gets. The logits decide nothing: each block of a deep model
    adds to the rounding of those before it, so that right products in FP8 may end in other logits.
    """
    with comparing(bundle.model, layers) as found:
        logits = difference(call().logits, reference)
    most = most_error(way.form)
    for name, error in found:
        if not error <= most:
            return f"wrong: the outputs of {name} differ by {error:.3g}, relative; rounding allows {most:.2g}"
    if not math.isfinite(logits):
        return "wrong: its logits are not finite"
    return {"relative_error": logits, "product_error": max((error for _, error in found), default=0.0)}


@contextlib.contextmanager
def comparing(model: nn.Module, layers: Mapping[str, Layer]) -> Iterator[list[tuple[str, float]]]:
    """In the context, compare every call of a layer with the dense layer on the same inputs.

    `layers` hold the dense ones, by the names of the modules of `model` in their place. Yields a list that receives
    the name and the relative error of each call.
    """
    found: list[tuple[str, float]] = []

    def compared(name: str) -> Callable[..., None]:
        dense_layer = layers[name].module.forward  # not its hooks: in the dense way, this is the layer itself
        return lambda module, args, options, outputs: found.append(
            (name, difference(outputs, dense_layer(*args, **options)))
        )

    hooks = [model.get_submodule(name).register_forward_hook(compared(name), with_kwargs=True) for name in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def product_calls(
    products: Sequence[SharedProduct], widths: Sequence[int], tokens: int, bundle: Bundle
) -> Callable[[], Any]:
    """Return a call of all products, one after the other, with random inputs `[tokens, in]`."""
    example = torch.empty(0, dtype=bundle.dtype, device=bundle.device)
    inputs = {width: random_inputs(tokens, example.new_empty(1, width)) for width in set(widths)}

    @torch.inference_mode()
    def call() -> None:
        for shared, width in zip(products, widths, strict=True):
            shared.product(inputs[width])

    return call


def figures_of(call: Callable[[], Any], products: Callable[[], Any], hardware: Hardware) -> dict[str, Any]:
    """Return the figures of a way that is installed."""
    eager = Times.of(list(steps(call, hardware, WARM_UP, REPEAT)))
    kernels = hardware.kernel_times(call)
    return {
        "eager": eager,
        "host": hardware.launch(call, HOST),
        "graph": graph_times(call, hardware),
        "products": graph_times(products, hardware),
        "device": sum(kernel.seconds for kernel in kernels),
        "launched": sum(kernel.count for kernel in kernels),
        "kernels": kernels[:KERNELS],
    }


def graph_times(call: Callable[[], Any], hardware: Hardware) -> Times | None:
    """Return the times of a call as one graph; None where it cannot be one."""
    graph = hardware.graphed(call)
    return Times.of(list(steps(graph, hardware, WARM_UP, REPEAT))) if graph else None
