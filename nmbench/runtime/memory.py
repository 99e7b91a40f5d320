"""Device memory that this process does not need any more."""

from __future__ import annotations

import gc

import torch


def give_back() -> None:
    """Return the memory of dead tensors to the GPU, for other processes."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
