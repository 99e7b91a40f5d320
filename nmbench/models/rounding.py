"""A model whose prunable weights are stored in 8 bits (`--weights int8`), and such a model in floats again."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nmbench.errors import NMBenchError, NumericalFailure
from nmbench.models.bundle import Bundle, Layer
from nmbench.models.eight_bit import EightBit, can_store, numbers, rounded, store, unstore
from nmbench.models.probe import MOST_TOKENS, logits
from nmbench.models.sharing import check_shared
from nmbench.models.substitution import multiply_only
from nmbench.pattern import all_finite
from nmbench.runtime.isolation import isolating


def store_eight_bit(bundle: Bundle) -> dict[str, Any]:
    """Store the prunable weights of `bundle` in 8 bits, in place; return the manifest's entry on it.

    `relative_error` is the norm of all changes over the norm of all weights. Raises `NMBenchError` for a layer that is
    no plain linear layer, or that shares its weight, and `NumericalFailure` for weights that are not finite.
    """
    check_shared(bundle)
    for layer in bundle.layers.values():
        check_storable(layer, bundle.ref)
    change = total = 0.0
    for layer in bundle.layers.values():
        weight = layer.read()
        if not all_finite(weight):
            raise NumericalFailure(f"layer {layer.name} of {bundle.ref} holds NaN or infinite weights.")
        found = rounded(weight)
        change += squares(numbers(*found).float() - weight.float())
        total += squares(weight.float())
        store(layer.module, found, layer.where.view)
    return {"bits": 8, "layers": len(bundle.layers), "relative_error": math.sqrt(change / total) if total else 0.0}


def check_storable(layer: Layer, ref: str) -> None:
    """Raise `NMBenchError` unless the weight of a layer can be stored in 8 bits."""
    if layer.fused or layer.where.parameter != "weight" or not can_store(layer.module):
        kind = "one of several experts in one parameter" if layer.fused else f"a {type(layer.module).__name__}"
        raise NMBenchError(
            f"--weights int8 cannot store layer {layer.name} of {ref}, {kind} and not a plain linear layer; leave it "
            f"dense with --skip {layer.name.rpartition('.')[2]!r}, or run without --weights."
        )


def squares(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))


@torch.no_grad()
def check_products(bundle: Bundle, tokens: Tensor) -> None:
    """Raise `NMBenchError` if the model reads an 8-bit weight elsewhere than in the product; `tokens` int64 `[n]`."""
    row = tokens[None, :MOST_TOKENS].to(bundle.device)
    remedy = "its code reads a weight beside the product; run it without --weights int8, or --skip such layers"
    with isolating():
        try:
            wanted = logits(bundle, row).float()
        except NMBenchError as error:
            raise NMBenchError(
                f"with --weights int8, {str(error).rstrip('.')}; if it runs without, {remedy}."
            ) from error
        if not multiply_only(bundle, list(bundle.layers), lambda: logits(bundle, row).float(), wanted):
            raise NMBenchError(f"{bundle.ref} computes other logits with --weights int8: {remedy}.")


def store_floats(bundle: Bundle) -> None:
    """Store 8-bit weights as floats, in place: the numbers that they stand for, masked ones as positive zeros.

    Layers that were left dense after the model had been stored in 8 bits are among them.
    """
    for module in bundle.model.modules():
        if isinstance(module, EightBit):
            unstore(module)
