"""One MaskPro step of one layer in one pass over memory: launchers of the Triton programs in `fused`.

A step draws the *old* mask again from the logits it was drawn from, updates the logits by its gradient, draws the *new*
mask and writes the masked weights; no mask is stored. Bytes per weight: 4 + 4 logits, 2 weight, 2 masked weight.

Random words are those of Philox4x32 (Salmon et al., SC 2011) with the counter (first_group + chunk, step, stream) and
the seed as key; a chunk is 8 consecutive weights of the layer, and streams are 0 for masks and 1 for rounding logits to
float16. Old masks use step - 1, new ones and rounding use step. 7 rounds pass the BigCrush tests, as the authors found;
10 are their margin for unknown ones, 5 % more instructions here.

`step` and `scale` are read on the device, nothing waits for the host and nothing is allocated, so that a CUDA graph can
capture a step, once a first call has compiled its program. `twin` has the same functions in plain torch.
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
    """How a program is spread over the device: chunks and warps of a block, with chunks >= 32 * warps.

    `registers`: the most that a thread may have. Named, it lets the assembler start both loads of logits before it
    computes; left to itself it saves registers that nobody else needs and waits for memory twice.
    """

    block: int = 128
    warps: int = 4
    registers: int | None = None


LAUNCHES = {4: Launch(registers=48), 8: Launch()}  # by group


def fused(keep: int, group: int, device: torch.device | str) -> bool:
    """Whether there is a program for this pattern on this device; otherwise `policy` does it in plain torch."""
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
) -> None:
    """logits += scale * grad log P(old mask), if `update`; then out = new mask * weight, if `draw`.

    logits [out, in], float32, or float16 rounded at random without bias; weight and out [out, in], of one dtype:
    bfloat16, float16 or float32; all contiguous. `step`: int64 [1]; scale: float32 [1].
    `first_group`: how many groups the layers before have. The old mask is the one that was drawn at step - 1 with the
    same seed, from the same logits; dropped weights become +0.0, also where the weight is NaN.
    """
    _check(logits, weight, out, keep, group)
    assert step.dtype == torch.int64 and scale.dtype == torch.float32 and step.shape == scale.shape == (1,)
    launch = launch or LAUNCHES[group]
    quads = logits.numel() // 4
    with torch.cuda.device_of(logits):
        _programs().step_program[_grid(quads, launch)](
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
def greedy(logits: Tensor, weight: Tensor, out: Tensor, keep: int, group: int, *, launch: Launch | None = None) -> None:
    """out = weight where the logit is among the `keep` largest of its group (equal ones: lower index), else +0.0."""
    _check(logits, weight, out, keep, group)
    launch = launch or Launch()
    quads = logits.numel() // 4
    with torch.cuda.device_of(logits):
        _programs().greedy_program[_grid(quads, launch)](
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
def _programs() -> Any:
    return importlib.import_module("nmbench_plugins.maskpro.fused")


def _check(logits: Tensor, weight: Tensor, out: Tensor, keep: int, group: int) -> None:
    """What the caller must have seen to; a wrong pointer would go unnoticed."""
    assert (keep, group) in FUSED, (keep, group)
    assert logits.dim() == 2 and logits.shape[1] % group == 0 and logits.numel() < 2**33, logits.shape
    assert logits.dtype in (torch.float32, torch.float16), logits.dtype
    assert weight.dtype in (torch.float32, torch.float16, torch.bfloat16), weight.dtype
    for tensor in (logits, weight, out):
        assert tensor.shape == logits.shape and tensor.is_contiguous() and tensor.device == logits.device
    assert out.dtype == weight.dtype, out.dtype


def _grid(quads: int, launch: Launch) -> tuple[int]:
    """Blocks that cover so many quadruples of weights."""
    return (-(-quads * 4 // (CHUNK * launch.block)),)


def _words(tensor: Tensor) -> Tensor:
    """The same memory as 32-bit words."""
    return tensor.view(torch.int32)


def _signed(bits: int) -> int:
    """The low 32 bits as a signed number: arguments of one type need one program."""
    low = bits & 0xFFFFFFFF
    return low - (low >> 31 << 32)
