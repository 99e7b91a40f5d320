"""Rounding to FP8 (e4m3) with one scale per row: weights once, inputs before every product."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from nmbench.runtime.triton import triton_available

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
LEAST = 1e-12  # of a row's largest magnitude, so that a row of zeros has a scale
MOST_COLUMNS = 2**15  # a program holds a row in registers


def quantised_rows(rows: Tensor, programs: Any = None) -> tuple[Tensor, Tensor]:
    """Return rows `[rows, columns]` as FP8 and their scales float32 `[rows, 1]`: `rows` is about FP8 times scale.

    A Triton program on an NVIDIA GPU, plain torch elsewhere. `programs` is a module like `program`, the default.
    """
    usable = rows.shape[1] <= MOST_COLUMNS and (programs or triton_available(rows.device))
    return by_triton(rows.contiguous(), programs or compiled()) if usable else by_torch(rows)


def by_torch(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`quantised_rows` in plain torch, several passes over the numbers."""
    scale = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=LEAST) / LARGEST
    return (rows.float() / scale).clamp(-LARGEST, LARGEST).to(FP8), scale


def by_triton(rows: Tensor, programs: Any) -> tuple[Tensor, Tensor]:
    """`quantised_rows` in one pass; rows are contiguous."""
    count, columns = rows.shape
    out = torch.empty(rows.shape, dtype=FP8, device=rows.device)
    scales = torch.empty(count, 1, dtype=torch.float32, device=rows.device)
    block = 1 << (columns - 1).bit_length()
    with torch.cuda.device_of(rows):
        programs.quantise_program[(count,)](
            rows, out, scales, columns, BLOCK=block, num_warps=4 if block <= 4096 else 8
        )
    return out, scales


@functools.cache
def compiled() -> Any:
    """Import the program at the first launch, because most machines have no Triton."""
    return importlib.import_module("nmbench.runtime.sparse24.program")


def quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows as FP8 with one scale for all, float32 `[1]`."""
    largest = torch.linalg.vector_norm(rows, torch.inf, dtype=torch.float32).clamp(min=LEAST)
    return (rows * (LARGEST / largest)).clamp(-LARGEST, LARGEST).to(FP8), (largest / LARGEST).reshape(1)
