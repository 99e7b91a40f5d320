"""Device memory that this process does not need any more, and that it can still take."""

from __future__ import annotations

import gc

import torch


def give_back() -> None:
    """Return the memory of dead tensors to the GPU, for other processes."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Return the bytes of a GPU that are free, or that torch holds without using them; of a CPU, none."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
