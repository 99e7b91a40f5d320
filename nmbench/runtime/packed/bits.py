"""Bits in bytes, lowest bit first, so that rows of any length begin at a whole byte."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_bits(bits: Tensor) -> Tensor:
    """Return the bits of every row in whole bytes: bool `[rows, n]` -> uint8 `[rows, ceil(n / 8)]`."""
    rows, count = bits.shape
    eights = F.pad(bits.view(torch.uint8), (0, -count % 8)).view(rows, -1, 8)  # [rows, bytes, 8]
    result = torch.zeros(eights.shape[:2], dtype=torch.uint8, device=bits.device)
    for bit, column in enumerate(eights.unbind(2)):
        result |= column << bit
    return result


def unpacked_bits(packed: Tensor, count: int) -> Tensor:
    """Return the first `count` bits of every row, the inverse of `packed_bits`: bool `[rows, count]`."""
    eights = torch.empty(*packed.shape, 8, dtype=torch.bool, device=packed.device)  # [rows, bytes, 8]
    for bit, column in enumerate(eights.unbind(2)):
        column.copy_((packed >> bit) & 1)
    return eights.view(len(packed), -1)[:, :count]
