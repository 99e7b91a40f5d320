"""Launch the programs of one layer: `write` sets the masked weight, `learn` updates logits and moments.

Nothing waits for the host and nothing is allocated, so that a CUDA graph can capture both after a first call has
compiled them. `relaxed` calls them where `usable`, and computes in torch elsewhere.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

import nmbench
from nmbench.pruning import salt_of
from nmbench.runtime import triton_available

LARGEST_GROUP = 8  # every member is in registers, once for every round
BLOCK = 128  # groups


def usable(pattern: nmbench.Pattern, device: torch.device, *tensors: Tensor) -> bool:
    """Return whether the programs run for this pattern on this device, and `tensors` lie as they need."""
    fits = pattern.unit == 1 and pattern.group <= LARGEST_GROUP and all(tensor.is_contiguous() for tensor in tensors)
    return fits and triton_available(device)


@torch.no_grad()
def write(
    logits: Tensor,
    dense: Tensor,
    out: Tensor,
    pattern: nmbench.Pattern,
    keys: Tensor,
    scales: Tensor,
    layer: int,
    programs: Any = None,
) -> None:
    """Set `out` to `dense` times the soft mask, all `[out, in]` and contiguous.

    keys: int32 `[2]`, of the step; scales: float32 `[2]`, temperature and noise scale. `layer` is the number of the
    layer in the model. `programs` is a module like `program`, which is the default.
    """
    groups = groups_of(pattern, logits, dense, out)
    with torch.cuda.device_of(logits):
        (programs or compiled()).write_program[grid(groups)](
            logits,
            dense,
            out,
            keys,
            scales,
            groups,
            salt_of(layer),
            KEEP=pattern.keep,
            GROUP=pattern.group,
            BLOCK=BLOCK,
        )


@torch.no_grad()
def learn(
    logits: Tensor,
    first: Tensor,
    second: Tensor,
    dense: Tensor,
    gradient: Tensor,
    pattern: nmbench.Pattern,
    keys: Tensor,
    scales: Tensor,
    pace: Tensor,
    epsilon: float,
    layer: int,
    programs: Any = None,
) -> None:
    """Take one step of Adam on `logits`, from the `gradient` of the live weight; arguments as for `write`.

    first and second: moments, float32; pace: float32 `[4]` (`logits.pace_of`).
    """
    groups = groups_of(pattern, logits, first, second, dense, gradient)
    with torch.cuda.device_of(logits):
        (programs or compiled()).learn_program[grid(groups)](
            logits,
            first,
            second,
            dense,
            gradient,
            keys,
            scales,
            pace,
            groups,
            salt_of(layer),
            EPSILON=epsilon,
            KEEP=pattern.keep,
            GROUP=pattern.group,
            BLOCK=BLOCK,
        )


def groups_of(pattern: nmbench.Pattern, *tensors: Tensor) -> int:
    """Return the number of groups, and assert what the programs rely on; Triton would not notice a wrong pointer."""
    for tensor in tensors:
        assert tensor.shape == tensors[0].shape and tensor.is_contiguous() and tensor.device == tensors[0].device
    assert tensors[0].shape[-1] % pattern.group == 0 and pattern.group <= LARGEST_GROUP
    groups = tensors[0].numel() // pattern.group
    assert groups < 2**31
    return groups


def grid(groups: int) -> tuple[int]:
    """Return the number of blocks that cover all groups."""
    return (-(-groups // BLOCK),)


@functools.cache
def compiled() -> Any:
    """Import the programs when they are first launched, because most machines have no Triton."""
    return importlib.import_module("nmbench_plugins.soft.kernels.program")
