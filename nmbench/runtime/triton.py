"""Where Triton programs can run; asked by every method that has one beside its plain torch."""

from __future__ import annotations

import importlib.util

import torch


def triton_available(device: torch.device | str) -> bool:
    """Whether the programs run there: an NVIDIA GPU of compute capability 8.0 or more, and Triton installed."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)
