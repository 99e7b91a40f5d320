"""Products of layers with other weights than those of the model, and the proof that this is possible."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmbench.models.bundle import Bundle, Layer
from nmbench.models.hooks import instead

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative, of logits
TOLERANCE_OF_HALVES = 0.02
NEVER = -128  # no 8-bit weight has this value
Provider = Callable[[str], Tensor]  # layer name -> the weight [out, in] to compute with


@contextlib.contextmanager
def substituted(bundle: Bundle, names: Iterable[str], provider: Provider) -> Iterator[None]:
    """While the context is open, the layers `names` compute with `provider(name)`, called before each product."""
    with contextlib.ExitStack() as stack:
        for name in names:
            module = bundle.layers[name].module
            stack.enter_context(instead(module, functools.partial(product, module, name, provider)))
        yield


def product(module: nn.Module, name: str, provider: Provider, input: Tensor) -> Tensor:
    """Return the output of a linear layer with the provided weight; the layer may store its weight transposed."""
    return F.linear(input, provider(name), getattr(module, "bias", None))


def multiply_only(bundle: Bundle, names: Sequence[str], logits: Callable[[], Tensor], wanted: Tensor) -> bool:
    """Return True if the layers `names` multiply by their weights, and nothing else reads these.

    The logits are `wanted`, to rounding, where the live weights are hidden and layers get them provided.
    """
    layers = [bundle.layers[name] for name in names]
    stored = {layer.name: layer.read() for layer in layers}

    def provider(name: str) -> Tensor:
        return bundle.layers[name].numbers(stored[name].to(bundle.device))

    with hidden(layers), substituted(bundle, names, provider):
        found = logits()
    tolerance = TOLERANCE.get(bundle.dtype, TOLERANCE_OF_HALVES)
    return bool((found - wanted).norm() <= tolerance * wanted.norm())


@contextlib.contextmanager
def hidden(layers: Iterable[Layer]) -> Iterator[None]:
    """Show NaN instead of the weights of `layers`, without memory of their size, while the context is open.

    8-bit weights cannot be NaN and show `NEVER`.
    """
    saved = []
    try:
        for layer in layers:
            parameter = layer.module.get_parameter(layer.where.parameter)
            saved.append((parameter, parameter.data))
            nothing = torch.nan if parameter.is_floating_point() else NEVER
            parameter.data = parameter.data.new_full((), nothing).expand(parameter.shape)
        yield
    finally:
        for parameter, weight in saved:
            parameter.data = weight
