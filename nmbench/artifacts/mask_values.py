"""Masks that are stored as numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from nmbench.artifacts.artifact import Unreadable


def as_mask(values: Tensor, name: str) -> Tensor:
    """The bool mask in zeros and ones of any dtype. Raises `Unreadable` for any other number."""
    if values.dtype == torch.bool:
        return values
    mask = values != 0
    if not bool((values == mask.to(values.dtype)).all()):
        raise Unreadable(f"{name} is no mask: it holds numbers besides 0 and 1.")
    return mask
