"""Launch the CUDA program of `program.cu`, which multiplies a packed weight of 2:4, 4:8 or 8:16 by a few vectors.

torch compiles the program by NVRTC at the first launch of a pattern, dtype and device. Where that fails, as without
NVRTC or in an older torch, a warning is logged once and the Triton program is used.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmbench.errors import first_line
from nmbench.pattern import Pattern
from nmbench.runtime.packed import by_triton
from nmbench.runtime.packed.weight import PackedWeight
from nmbench.runtime.triton import nvidia_available

PATTERNS = (Pattern(2, 4), Pattern(4, 8), Pattern(8, 16))
SEGMENT = 16  # members of a row that a thread reads at once: 8 values are 16 bytes
ROWS = 16  # of a block
MANY_ROWS = 8192  # blocks of fewer warps then fill the device
SOURCE = Path(__file__).with_name("program.cu")
NAME = "packed_product"

logger = logging.getLogger("nmbench")


@dataclass(frozen=True)
class Launch:
    """The form of the program.

    warps: of a block, which share the columns of 16 rows. chunks: of 64 columns that a warp reads at once. ahead: the
    next chunks are read before the present ones are multiplied. blocks: at least so many have room on a multiprocessor,
    which bounds the registers of a thread. Tuned for 2:4 on an H100 by `benchmarks/packed_linear.py --tune`.
    """

    warps: int = 16
    chunks: int = 1
    ahead: bool = True
    blocks: int = 2

    @classmethod
    def of(cls, packed: PackedWeight) -> Launch:
        """Return the form for a weight: where there are many rows, fewer warps share them."""
        return cls(warps=8, blocks=4) if packed.shape[0] >= MANY_ROWS else cls()


def usable(packed: PackedWeight, x: Tensor) -> bool:
    """Return whether the program multiplies `x` `[tokens, in]` on its device."""
    if not fits(packed, x) or not nvidia_available(x.device):
        return False
    return kernel(packed.pattern.group, x.dtype, x.device, Launch.of(packed)) is not None


def fits(packed: PackedWeight, x: Tensor) -> bool:
    """Return whether there is a program for this pattern, shape and dtype, on whatever device."""
    whole = packed.pattern in PATTERNS and packed.inputs % SEGMENT == 0
    aligned = packed.values.data_ptr() % 16 == 0 and packed.codes.data_ptr() % 2 == 0
    return whole and aligned and by_triton.fits(packed, x)


@torch.no_grad()
def product(
    packed: PackedWeight, x: Tensor, bias: Tensor | None = None, launch: Launch | None = None, program: Any = None
) -> Tensor:
    """Return `x` `[tokens, in]` times the weight, plus `bias` `[out]`: `[tokens, out]` in the dtype of `x`.

    `program` takes grid, block and arguments; the compiled one is the default.
    """
    assert fits(packed, x) and packed.values.is_contiguous() and packed.codes.is_contiguous()
    assert x.shape[1] == packed.inputs and x.device == packed.values.device == packed.codes.device
    launch, rows, x = launch or Launch.of(packed), packed.shape[0], by_triton.aligned(x.contiguous(), 16)
    program = program or kernel(packed.pattern.group, x.dtype, x.device, launch)
    assert program is not None
    out = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    numbers = [rows, packed.inputs // SEGMENT, x.shape[0], int(bias is not None)]
    with torch.cuda.device_of(x):
        program(
            (-(-rows // ROWS), 1, 1),
            (32 * launch.warps, 1, 1),
            [packed.values, packed.codes, x, out if bias is None else bias, out, *numbers],
        )
    return out


@functools.cache
def kernel(group: int, dtype: torch.dtype, device: torch.device, launch: Launch) -> Any | None:
    """Return the compiled program, or None, with a warning in the log, if it cannot be compiled."""
    try:
        with torch.cuda.device(device), without_toolkit():
            options = [f"-D{name}={value}" for name, value in constants(group, dtype, launch).items()]
            return torch.cuda._compile_kernel(SOURCE.read_text(), NAME, nvcc_options=options)
    except Exception as error:  # of torch, which has none of its own for this
        reason = first_line(error)
        logger.warning("packed weights are multiplied by the Triton program; CUDA did not compile: %s", reason)
        return None


def constants(group: int, dtype: torch.dtype, launch: Launch) -> dict[str, int]:
    """Return the constants that `program.cu` must be given."""
    form = {"WARPS": launch.warps, "CHUNKS": launch.chunks, "AHEAD": int(launch.ahead), "BLOCKS": launch.blocks}
    return {"GROUP": group, "BRAIN": int(dtype == torch.bfloat16), **form}


@contextlib.contextmanager
def without_toolkit() -> Iterator[None]:
    """Let torch compile where no CUDA toolkit is installed: torch asks for its headers, but the program has none."""
    extension: Any = importlib.import_module("torch.utils.cpp_extension")
    home = extension.CUDA_HOME
    extension.CUDA_HOME = home or "/usr"  # the folder that torch does not name to the compiler
    try:
        yield
    finally:
        extension.CUDA_HOME = home
