"""Fused experts: parameters that hold one matrix for each expert, `[experts, out, in]` or `[experts, in, out]`.

Which of the two it is, a module declares by the boolean `is_transposed`, as in transformers 5. Modules that state a
number of experts but no layout (JetMoe, Llama 4, LongCat-Flash, Step 3) have one that follows from their sizes: those
that they state as `input_size` and `output_size`, or those of two parameters of which the first is a gate above an up
projection, so that it has twice as many outputs as the second has inputs. Where sizes fit both layouts, or neither, the
experts stay dense: a mask along the wrong dimension would not be N:M.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from nmbench.models.routers import stated

SIZES = (("input_size", "output_size"), ("in_features", "out_features"))


@dataclass(frozen=True)
class FusedExperts:
    """Parameters of fused experts by name, the number of experts that all of them hold, and their layout."""

    parameters: Mapping[str, nn.Parameter]
    number: int
    transposed: bool


def fused_experts(module: nn.Module) -> FusedExperts | None:
    """Return the fused experts of a module; None if it has none, or if their layout is unknown."""
    own = module.named_parameters(recurse=False)
    found = {name: value for name, value in own if value.dim() == 3 and value.numel()}
    transposed = layout(module, list(found.values())) if found else None
    if transposed is None:
        return None
    return FusedExperts(found, min(map(len, found.values())), transposed)


def layout(module: nn.Module, parameters: list[nn.Parameter]) -> bool | None:
    """Return whether parameters are `[experts, in, out]`; None if that is unknown."""
    if isinstance(declared := getattr(module, "is_transposed", None), bool):
        return declared
    if not {len(value) for value in parameters} & stated(module):
        return None
    shapes = [(value.shape[1], value.shape[2]) for value in parameters]
    fitting = set(by_stated_sizes(module, shapes)) or set(by_gate(shapes))
    return next(iter(fitting)) if len(fitting) == 1 else None


def by_stated_sizes(module: nn.Module, shapes: list[tuple[int, int]]) -> Iterator[bool]:
    """Yield the layouts that fit the sizes that a module with one parameter states."""
    for inputs, outputs in SIZES:
        sizes = (getattr(module, outputs, None), getattr(module, inputs, None))
        if shapes == [sizes]:
            yield False
        if shapes == [sizes[::-1]]:
            yield True


def by_gate(shapes: list[tuple[int, int]]) -> Iterator[bool]:
    """Yield the layouts in which one of two parameters has twice as many outputs as the other has inputs."""
    if len(shapes) == 2:
        for (a, b), (c, d) in (shapes, shapes[::-1]):
            if a == 2 * d and b == c:
                yield False
            if b == 2 * c and a == d:
                yield True
