"""Launch one MaskPro step of one layer: a Triton program of `program` that passes over memory once.

A step draws the *old* mask again from the logits of the step before, updates the logits by the gradient at that mask,
draws the *new* mask and writes the masked weights; no mask is stored. Bytes per weight: 4 + 4 logits, 2 weight, 2
masked weight.

Random words are those of Philox4x32 (Salmon et al., SC 2011) with the counter (first_group + chunk, step, stream) and
the seed as key. A chunk is 8 consecutive weights of the layer; stream 0 is for masks and stream 1 for rounding logits
to float16. Old masks use step - 1; new masks and rounding use step. 7 rounds pass the BigCrush tests, as the authors
found; the authors recommend 10 rounds as a margin for unknown tests, which are 5 % more instructions here.

`step` and `scale` are read on the device, nothing waits for the host and nothing is allocated, so that a CUDA graph can
capture a step after a first call has compiled the program. `reference` has the same functions in plain torch.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nmbench.runtime import triton_available

FUSED = frozenset({(1, 4), (2, 4), (4, 8)})  # keep, group
ROUNDS = 7
CHUNK = 8  # weights


@dataclass(frozen=True)
class Launch:
    """The size of one block of a program: `block` chunks and `warps` warps, with block >= 32 * warps.

    `registers` is the limit for one thread. With a limit, the assembler starts both loads of logits before the
    arithmetic; without a limit, the assembler saves registers that no other block needs and waits for memory twice.
    """

    block: int = 128
    warps: int = 4
    registers: int | None = None


LAUNCHES = {4: Launch(registers=48), 8: Launch()}  # by group


def usable(keep: int, group: int, device: torch.device | str) -> bool:
    """Return whether a program for this pattern runs on this device; elsewhere `policy` computes in plain torch."""
    return (keep, group) in FUSED and triton_available(device)


@torch.no_grad()
def step(
    logits: Tensor,
    weight: Tensor,
    out: Tensor,
    keep: int,
    group: int,
    *,
    seed: int,
    first_group: int,
    step: Tensor,
    scale: Tensor,
    update: bool,
    draw: bool,
    launch: Launch | None = None,
    programs: Any = None,
) -> None:
    """Do logits += scale * grad log P(old mask), if `update`; then out = new mask * weight, if `draw`.

    logits [out, in]: float32, or float16 rounded at random without bias; weight and out [out, in]: bfloat16, float16 or
    float32, both the same; all contiguous. step: int64 [1]; scale: float32 [1]. `first_group` is the number of groups
    in the layers before this layer. The old mask is the mask drawn at step - 1 with the same seed from the same logits.
    Dropped weights become +0.0, NaN included. `programs` is a module like `program`, which is the default.
    """
    _check(logits, weight, out, keep, group)
    assert step.dtype == torch.int64 and scale.dtype == torch.float32 and step.shape == scale.shape == (1,)
    launch = launch or LAUNCHES[group]
    quads = logits.numel() // 4
    with torch.cuda.device_of(logits):
        (programs or compiled()).step_program[_grid(quads, launch)](
            _words(logits) if logits.dtype == torch.float16 else logits,
            _words(weight),
            _words(out),
            scale,
            step,
            _signed(seed),
            _signed(seed >> 32),
            first_group,
            quads,
            KEEP=keep,
            GROUP=group,
            UPDATE=update,
            DRAW=draw,
            WIDE=weight.dtype == torch.float32,
            WHOLE=quads % 2 == 0,
            ROUNDS=ROUNDS,
            BLOCK=launch.block,
            num_warps=launch.warps,
            maxnreg=launch.registers,
        )


@torch.no_grad()
def greedy(
    logits: Tensor,
    weight: Tensor,
    out: Tensor,
    keep: int,
    group: int,
    *,
    launch: Launch | None = None,
    programs: Any = None,
) -> None:
    """Set `out` to the weight where the logit is among the `keep` largest of its group, and to +0.0 elsewhere.

    Among equal logits the lower index wins. Arguments are those of `step`.
    """
    _check(logits, weight, out, keep, group)
    launch = launch or Launch()
    quads = logits.numel() // 4
    with torch.cuda.device_of(logits):
        (programs or compiled()).greedy_program[_grid(quads, launch)](
            _words(logits) if logits.dtype == torch.float16 else logits,
            _words(weight),
            _words(out),
            quads,
            KEEP=keep,
            GROUP=group,
            WIDE=weight.dtype == torch.float32,
            WHOLE=quads % 2 == 0,
            BLOCK=launch.block,
            num_warps=launch.warps,
            maxnreg=launch.registers,
        )


@functools.cache
def compiled() -> Any:
    """Import the programs when they are first launched, because most machines have no Triton."""
    return importlib.import_module("nmbench_plugins.maskpro.kernels.program")


def _check(logits: Tensor, weight: Tensor, out: Tensor, keep: int, group: int) -> None:
    """Assert the shapes and types that the programs rely on; Triton would not notice a wrong pointer."""
    assert (keep, group) in FUSED, (keep, group)
    assert logits.dim() == 2 and logits.shape[1] % group == 0 and logits.numel() < 2**33, logits.shape
    assert logits.dtype in (torch.float32, torch.float16), logits.dtype
    assert weight.dtype in (torch.float32, torch.float16, torch.bfloat16), weight.dtype
    for tensor in (logits, weight, out):
        assert tensor.shape == logits.shape and tensor.is_contiguous() and tensor.device == logits.device
    assert out.dtype == weight.dtype, out.dtype


def _grid(quads: int, launch: Launch) -> tuple[int]:
    """Return the number of blocks that cover `quads` quadruples of weights."""
    return (-(-quads * 4 // (CHUNK * launch.block)),)


def _words(tensor: Tensor) -> Tensor:
    """Return the same memory as 32-bit words."""
    return tensor.view(torch.int32)


def _signed(bits: int) -> int:
    """Return the low 32 bits as a signed number: arguments of one type need only one compiled program."""
    low = bits & 0xFFFFFFFF
    return low - (low >> 31 << 32)
