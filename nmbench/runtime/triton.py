"""The check that Triton programs can run, for methods that also have a plain torch reference."""

from __future__ import annotations

import importlib.util

import torch


def triton_available(device: torch.device | str) -> bool:
    """True if `device` is an NVIDIA GPU of compute capability 8.0 or more and Triton is installed."""
    return nvidia_available(device) and importlib.util.find_spec("triton") is not None


def nvidia_available(device: torch.device | str) -> bool:
    """True if `device` is an NVIDIA GPU of compute capability 8.0 or more."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
