"""Equality of tensors by their bits."""

from __future__ import annotations

import torch
from torch import Tensor


def same_bits(a: Tensor, b: Tensor) -> bool:
    """True if two tensors agree in dtype, shape, device and every bit.

    By `==`, -0.0 equals 0.0 and no NaN equals itself; by bits, -0.0 differs from 0.0, and a NaN equals a NaN of
    the same bits. Tensors of the meta device have no bits and are equal.
    """
    if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
        return False
    return a.device.type == "meta" or torch.equal(as_bytes(a), as_bytes(b))


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor in the order of its entries, uint8 `[bytes]`; a copy only if not contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
