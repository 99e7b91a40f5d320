"""Checksums of the tensors and the metadata of a file, so that damage is found when the file is read."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SUMS = "nmbench.crc32"  # a name in the metadata
METADATA = ""  # stands for the metadata among the names of tensors


def sums(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, int]:
    """Return the CRC-32 of every tensor in host memory by name, and that of the metadata as JSON."""
    canonical = json.dumps(dict(metadata), sort_keys=True).encode()
    return {**{name: sum_of(tensors[name]) for name in sorted(tensors)}, METADATA: zlib.crc32(canonical)}


def sum_of(tensor: Tensor) -> int:
    """Return the CRC-32 of the bytes of a contiguous tensor."""
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)
