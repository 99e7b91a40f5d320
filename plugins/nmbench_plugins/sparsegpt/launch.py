"""Launch the Triton program that sweeps one block of columns; `reference` has the same function in plain torch.

Rows are independent, so that one program takes a few rows through all columns of a block. The results differ from those
of the plain loop by rounding only: products and sums are fused.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import nmbench
from nmbench.runtime import triton_available

GROUPS = (2, 4, 8, 16)  # M of the N:M patterns that have a program, for every N
TILE = 32  # columns in which the columns of a group are found; a group never crosses the end of a tile
WIDEST = 128  # columns of a block, which stay in registers
CHUNK = 4  # columns whose errors are computed before all columns are updated


@dataclass(frozen=True)
class Launch:
    """The size of one program: its rows and warps."""

    rows: int = 32
    warps: int = 8


def has_program(pattern: nmbench.Pattern, width: int) -> bool:
    """Return whether there is a program for blocks of `width` columns of this pattern."""
    return pattern.unit == 1 and pattern.group in GROUPS and width <= WIDEST


def usable(pattern: nmbench.Pattern, width: int, device: torch.device) -> bool:
    """Return whether a program for such blocks runs on this device; elsewhere the plain loop sweeps the blocks."""
    return has_program(pattern, width) and triton_available(device)


@torch.no_grad()
def sweep_block(
    weight: Tensor,
    mask: Tensor,
    spread: Tensor,
    pivots: Tensor,
    pattern: nmbench.Pattern,
    launch: Launch | None = None,
    programs: Any = None,
) -> None:
    """Prune one block of columns in place, as `reference.sweep_block`; float32 only.

    The host does not wait for the device, so that a score that is not finite does not raise. Such a score leaves a
    weight that is not finite, and then the mask is meaningless. `programs` is a module like `program`, the default.
    """
    _check(weight, mask, spread, pivots, pattern)
    launch = launch or Launch()
    rows, width = weight.shape
    with torch.cuda.device_of(weight):
        (programs or compiled()).sweep_program[(-(-rows // launch.rows),)](
            weight,
            mask.view(torch.uint8),
            spread,
            pivots,
            rows,
            weight.stride(0),
            mask.stride(0),
            spread.stride(0),
            KEEP=pattern.keep,
            GROUP=pattern.group,
            ROWS=launch.rows,
            TILE=TILE,
            CHUNK=CHUNK,
            WIDTH=width,
            TILES=-(-width // TILE),
            num_warps=launch.warps,
        )


@functools.cache
def compiled() -> Any:
    """Import the program at the first launch, because most machines have no Triton."""
    return importlib.import_module("nmbench_plugins.sparsegpt.program")


def _check(weight: Tensor, mask: Tensor, spread: Tensor, pivots: Tensor, pattern: nmbench.Pattern) -> None:
    """Assert the shapes and types that the program relies on; Triton would not notice a wrong pointer."""
    width = weight.shape[1]
    assert has_program(pattern, width) and pattern.divides(width), (pattern, width)
    assert mask.shape == weight.shape and spread.shape == (width, width) and pivots.shape == (width,)
    assert mask.dtype == torch.bool and mask.device == weight.device
    for tensor in (weight, spread, pivots):
        assert tensor.dtype == torch.float32 and tensor.device == weight.device and tensor.stride(-1) == 1
    assert mask.stride(-1) == 1
