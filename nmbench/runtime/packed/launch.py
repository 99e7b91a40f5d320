"""The choice among programs that multiply a packed weight by a few vectors; `reference` is the same in plain torch.

A program reads a weight once for up to `by_triton.MOST_TOKENS` vectors: at decoding, its time is that of reading the
packed bytes. Nothing waits for the host. A CUDA graph can capture it after a first call has compiled the program.
"""

from __future__ import annotations

from torch import Tensor

from nmbench.runtime.packed import by_cuda, by_triton
from nmbench.runtime.packed.weight import PackedWeight


def program_of(packed: PackedWeight, x: Tensor) -> str | None:
    """Return which program multiplies `x` `[tokens, in]`: "cuda", "triton", or None if the weight must be unpacked."""
    if by_cuda.usable(packed, x):
        return "cuda"
    return "triton" if by_triton.usable(packed, x) else None


def product(packed: PackedWeight, x: Tensor, bias: Tensor | None, program: str) -> Tensor:
    """Return `x` `[tokens, in]` times the weight, plus `bias` `[out]`: `[tokens, out]` in the dtype of `x`.

    `program` is the answer of `program_of`.
    """
    return (by_cuda if program == "cuda" else by_triton).product(packed, x, bias)
