"""Launch the Triton program of `program.py`, which multiplies a packed weight of any pattern by a few vectors."""

from __future__ import annotations

import functools
import importlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nmbench.runtime.packed.weight import PackedWeight, by_index, group_bits, index_bits
from nmbench.runtime.triton import triton_available

MOST_TOKENS = 8
LARGEST_GROUP = 16  # the members of a group stay in registers
WORD = 4  # 16-bit numbers in the largest word
WORDS = {1: torch.int16, 2: torch.int32, 4: torch.int64}
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Launch:
    """The size of one program: rows, groups read at once, and warps.

    One warp needs no barrier to share the vectors among its rows. The defaults follow the instructions of the compiled
    program for each value (14 at 2:4 and one token). They were not tuned on a GPU, as
    `benchmarks/packed_linear.py --tune` does.
    """

    rows: int = 4
    block: int = 128
    warps: int = 1

    @classmethod
    def of(cls, tokens: int) -> Launch:
        """Return the size for a number of tokens: few sums in registers leave room for more reads at once."""
        return cls(2, 256) if tokens <= 2 else cls()


def usable(packed: PackedWeight, x: Tensor) -> bool:
    """Return whether the program multiplies `x` `[tokens, in]` on its device; elsewhere the weight is unpacked."""
    return fits(packed, x) and triton_available(x.device)


def fits(packed: PackedWeight, x: Tensor) -> bool:
    """Return whether there is a program for this pattern, shape and dtype, on whatever device."""
    whole = packed.pattern.divides(packed.inputs) and packed.pattern.group <= LARGEST_GROUP
    same = packed.values.dtype == x.dtype and x.dtype in DTYPES
    trained = torch.is_grad_enabled() and x.requires_grad
    return whole and same and not trained and 1 <= x.shape[0] <= MOST_TOKENS


@torch.no_grad()
def product(
    packed: PackedWeight,
    x: Tensor,
    bias: Tensor | None = None,
    launch: Launch | None = None,
    programs: Any = None,
) -> Tensor:
    """Return `x` `[tokens, in]` times the weight, plus `bias` `[out]`: `[tokens, out]` in the dtype of `x`.

    `programs` is a module like `program`, which is the default.
    """
    assert fits(packed, x) and packed.values.is_contiguous() and packed.codes.is_contiguous()
    assert x.shape[1] == packed.inputs and x.device == packed.values.device == packed.codes.device
    launch = launch or Launch.of(x.shape[0])
    pattern, rows, x = packed.pattern, packed.shape[0], x.contiguous()
    values, members = math.gcd(pattern.keep, WORD), math.gcd(pattern.group, WORD)
    out = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        (programs or compiled()).product_program[(-(-rows // launch.rows),)](
            packed.values.view(WORDS[values]),
            packed.codes,
            aligned(x, 8).view(WORDS[members]),
            out if bias is None else bias,
            out,
            rows,
            packed.groups,
            packed.codes.shape[1],
            KEEP=pattern.keep,
            GROUP=pattern.group,
            BITS=index_bits(pattern) if by_index(pattern) else 0,
            CODE=group_bits(pattern),
            BYTES=bytes_of_code(group_bits(pattern)),
            VALUES=values,
            MEMBERS=members,
            BATCH=x.shape[0],
            BRAIN=x.dtype == torch.bfloat16,
            BIAS=bias is not None,
            ROWS=launch.rows,
            BLOCK=launch.block,
            num_warps=launch.warps,
        )
    return out


def aligned(x: Tensor, bytes: int) -> Tensor:
    """Return `x`, or a copy if its memory does not begin where a word of so many bytes may."""
    return x if x.data_ptr() % bytes == 0 else x.clone()


def bytes_of_code(bits: int) -> int:
    """Return the number of bytes in which a code of that many bits may lie, wherever it begins."""
    return max(-(-(group * bits % 8 + bits) // 8) for group in range(8))


@functools.cache
def compiled() -> Any:
    """Import the program at the first launch, because most machines have no Triton."""
    return importlib.import_module("nmbench.runtime.packed.program")
