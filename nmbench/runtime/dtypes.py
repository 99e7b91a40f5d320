"""Names of dtypes."""

from __future__ import annotations

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as files and flags have it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")
