"""Parameters of a module by the names of layers, and their return to what they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from nmbench.models.bundle import Layer


def stored_tensors(
    module: nn.Module, prefix: str, layers: Mapping[str, Layer], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return tensors as `module` stores them, parameter name -> tensor, made of `weights` by layer or parameter name.

    Experts that share one parameter are written into a copy of the parameter; gradients pass through.
    """
    stored: dict[str, Tensor] = {}
    for name, weight in weights.items():
        layer = layers.get(name)
        full = name if layer is None else layer.where.stored
        own = full.removeprefix(f"{prefix}.")
        live = module.get_parameter(own)
        cast = weight.to(live.device, live.dtype)
        if layer is None or not layer.fused:
            stored[own] = cast.t() if layer is not None and layer.transposed else cast
            continue
        if own not in stored:
            stored[own] = live.detach().clone()
        layer.where.view(stored[own]).copy_(cast)
    return stored


@contextlib.contextmanager
def parameters_kept(module: nn.Module) -> Iterator[None]:
    """At the end of the context, the parameters of a module are put back as they were at its beginning."""
    before = [parameter.detach().clone() for parameter in module.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(module.parameters(), before, strict=True):
                parameter.copy_(values)
