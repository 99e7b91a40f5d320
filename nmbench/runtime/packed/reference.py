"""The packed product in plain torch, the readable counterpart of `program`: unpack, multiply, accumulate in float32."""

from __future__ import annotations

from torch import Tensor

from nmbench.runtime.packed.weight import PackedWeight, unpack


def product(packed: PackedWeight, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x` `[tokens, in]` times the weight, plus `bias` `[out]`: `[tokens, out]` in the dtype of `x`."""
    result = x.float() @ unpack(packed).float().t()  # [tokens, out]
    return (result if bias is None else result + bias.float()).to(x.dtype)
