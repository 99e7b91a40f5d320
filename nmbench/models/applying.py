"""Writing pruned weights into the live model: kept weights, repaired or dense, and positive zeros elsewhere."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nmbench.errors import NMBenchError
from nmbench.methods import Pruned, PrunedModel
from nmbench.models.bundle import Bundle


def applied(pruned: Pruned, dense: Tensor) -> Tensor:
    """Return the weight `[out, in]` to evaluate, in the dtype of `dense`: kept weights and positive zeros.

    A repaired weight that is rounded to -0.0 becomes 0.0. Raises `NMBenchError` for a repaired weight that would have
    to be stored in 8 bits.
    """
    if pruned.weight is not None and not dense.is_floating_point():
        raise NMBenchError("new weights do not fit weights that are stored in 8 bits; run without --weights int8.")
    weight = dense if pruned.weight is None else pruned.weight.to(dense.dtype) + 0.0
    return weight.masked_fill(~pruned.mask, 0.0)


def apply(bundle: Bundle, pruned: PrunedModel) -> None:
    """Write a pruned model into the live model."""
    for name, layer in bundle.layers.items():
        bundle.open(name)
        dense = layer.read()
        found = pruned.layers[name]
        layer.write(applied(moved(found, dense.device), dense))
        for tensor in (layer.read(), found.mask, found.weight):
            if tensor is not None:
                bundle.release(tensor)
    for name, tensor in pruned.others.items():
        bundle.open(name)
        bundle.model.get_parameter(name).detach().copy_(tensor)


def moved(pruned: Pruned, device: torch.device) -> Pruned:
    """Return the same pruned layer on `device`."""
    weight = None if pruned.weight is None else pruned.weight.to(device)
    return dataclasses.replace(pruned, mask=pruned.mask.to(device), weight=weight)
