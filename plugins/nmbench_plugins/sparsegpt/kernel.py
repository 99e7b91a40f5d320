"""Launches the Triton program that sweeps one block of columns; `sweep.sweep_block` is the same in plain torch.

Rows do not know of each other, so that a program takes a few rows through all columns of a block. Its numbers are those
of the plain loop but for rounding: products and sums are fused.
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

GROUPS = (2, 4, 8, 16)  # of N:M patterns that there are programs for, whatever N is
TILE = 32  # columns that are searched for those of a group at a time; groups do not straddle it
WIDEST = 128  # columns of a block: they stay in registers
CHUNK = 4  # columns whose errors are found before all columns are updated


@dataclass(frozen=True)
class Launch:
    """How a program is spread over the device: rows and warps of a program."""

    rows: int = 32
    warps: int = 8


def sweeps(pattern: nmbench.Pattern, width: int) -> bool:
    """Whether there is a program for blocks of `width` columns of this pattern."""
    return pattern.group in GROUPS and width <= WIDEST


def fused(pattern: nmbench.Pattern, width: int, device: torch.device) -> bool:
    """Whether blocks are swept by a program there; otherwise the plain loop does it."""
    return sweeps(pattern, width) and triton_available(device)


@torch.no_grad()
def sweep_block(
    weight: Tensor,
    mask: Tensor,
    spread: Tensor,
    pivots: Tensor,
    pattern: nmbench.Pattern,
    launch: Launch | None = None,
) -> None:
    """Prune one block of columns in place, as `sweep.sweep_block` does; float32 only.

    Nothing waits for the device, so that a score that is not finite does not raise: it leaves a weight that is not
    finite where it was, and the mask means nothing then.
    """
    _check(weight, mask, spread, pivots, pattern)
    launch = launch or Launch()
    rows, width = weight.shape
    with torch.cuda.device_of(weight):
        _programs().sweep_program[(-(-rows // launch.rows),)](
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
def _programs() -> Any:
    return importlib.import_module("nmbench_plugins.sparsegpt.program")


def _check(weight: Tensor, mask: Tensor, spread: Tensor, pivots: Tensor, pattern: nmbench.Pattern) -> None:
    """What the caller must have seen to; a wrong pointer would go unnoticed."""
    width = weight.shape[1]
    assert sweeps(pattern, width) and pattern.divides(width), (pattern, width)
    assert mask.shape == weight.shape and spread.shape == (width, width) and pivots.shape == (width,)
    assert mask.dtype == torch.bool and mask.device == weight.device
    for tensor in (weight, spread, pivots):
        assert tensor.dtype == torch.float32 and tensor.device == weight.device and tensor.stride(-1) == 1
    assert mask.stride(-1) == 1
