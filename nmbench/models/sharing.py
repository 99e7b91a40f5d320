"""Weights under several names: pruning one layer would change another part of the model unasked."""

from __future__ import annotations

from nmbench.errors import NMBenchError
from nmbench.models.bundle import Bundle, Layer


def check_shared(bundle: Bundle) -> None:
    """Raise `NMBenchError` if a prunable weight shares its memory with another parameter of the model.

    One module under two names of its block is one layer. Layers that stay dense may share their weights.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in bundle.model.named_parameters(remove_duplicate=False):
        if parameter.numel() and not parameter.is_meta:
            names.setdefault(parameter.data_ptr(), []).append(name)
    for layer in bundle.layers.values():
        for other in names.get(layer.module.get_parameter(layer.where.parameter).data_ptr(), ()):
            if other != layer.where.stored and not is_alias(other, layer, bundle):
                raise NMBenchError(
                    f"layers {layer.where.module} and {other.rpartition('.')[0]} share one weight, which cannot be "
                    f"pruned; leave all layers that share it dense with --skip."
                )


def is_alias(other: str, layer: Layer, bundle: Bundle) -> bool:
    """True if the parameter `other` is that of a layer's own module, under a second name inside its block."""
    block = list(bundle.blocks)[layer.block]
    alias = f"the same module as {layer.name}"
    return other.startswith(f"{block}.") and bundle.skipped.get(other, "").startswith(alias)
