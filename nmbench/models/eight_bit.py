"""Linear layers whose weight is stored as int8 with one scale per output, and multiplied as a float weight.

A weight w of output i is stored as q = round(w / s_i), where the scale s_i is max |w| / 127 over the inputs of the
output, and -127 <= q <= 127. The layer computes with q s_i, in the dtype of its inputs: that product is a temporary
tensor of one layer. A masked weight is q = 0, so that pruning changes no scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

MOST = 127  # of |q|: the range is symmetric
SCALE = "weight_scale"  # name of the parameter [out] beside the parameter `weight`


class Rounded(NamedTuple):
    """A weight in 8 bits: `values` int8 `[out, in]`, `scale` `[out]` in the dtype of the weight."""

    values: Tensor
    scale: Tensor


def rounded(weight: Tensor) -> Rounded:
    """Return a finite float weight `[out, in]` rounded to the nearest multiples of a scale for each output.

    A scale is at least the smallest normal number of its dtype, and that of an output with zeros alone is any.
    """
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale = (exact.abs().amax(dim=1) / MOST).to(weight.dtype).clamp_min(torch.finfo(weight.dtype).tiny)
    values = (exact / scale.to(exact.dtype)[:, None]).round_().clamp_(-MOST, MOST)
    return Rounded(values.to(torch.int8), scale)


def numbers(values: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the weight `[out, in]` of int8 `values` `[out, in]` and `scale` `[out]`, in the dtype of `scale`."""
    return torch.mul(values, scale[:, None], out=out)


class EightBit(nn.Module):
    """The base of linear layers with an int8 parameter `weight` and a parameter `weight_scale` `[out]`."""

    weight_scale: nn.Parameter


class EightBitLinear(EightBit, nn.Linear):
    """`nn.Linear` with a weight int8 `[out, in]`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, numbers(self.weight, self.weight_scale.to(input.dtype)), self.bias)


class EightBitConv1D(EightBit, Conv1D):
    """`Conv1D` of transformers with a weight int8 `[in, out]`."""

    weight: nn.Parameter
    bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, numbers(self.weight.t(), self.weight_scale.to(x.dtype)), self.bias)


CLASSES: dict[type, type] = {nn.Linear: EightBitLinear, Conv1D: EightBitConv1D}


def can_store(module: nn.Module) -> bool:
    """Return True for a plain `nn.Linear` or `Conv1D`: other classes may do more than multiply by their weight."""
    return type(module) in CLASSES and "forward" not in vars(module)


def store(module: Any, weight: Rounded, view: Callable[[Tensor], Tensor]) -> None:
    """Make `module`, which `can_store`, one with the weight in 8 bits; `view` is that of `Weight`.

    The module stays the same object, as in `torch.nn.utils.parametrize`, so that its hooks stay as well.
    """
    module.weight = nn.Parameter(view(weight.values).contiguous(), requires_grad=False)
    module.register_parameter(SCALE, nn.Parameter(weight.scale, requires_grad=False))
    module.__class__ = CLASSES[type(module)]


def unstore(module: Any) -> None:
    """Make an 8-bit `module` one of its former class again, with the floats that its weight stands for."""
    turned = isinstance(module, Conv1D)  # its weight is [in, out]
    values = module.weight.detach()
    weight = numbers(values.t() if turned else values, module.weight_scale.detach())
    module.__class__ = next(before for before, after in CLASSES.items() if after is type(module))
    delattr(module, SCALE)
    module.weight = nn.Parameter((weight.t() if turned else weight).contiguous(), requires_grad=False)
