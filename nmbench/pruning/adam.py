"""A step of Adam (Kingma and Ba, arXiv 1412.6980) in place, with the settings of the step in a tensor on the device.

So a CUDA graph of an update is replayed with new settings, and at settings of 0 the step changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

BETAS = (0.9, 0.95)


def pace_of(rate: float, step: int, betas: tuple[float, float] = BETAS) -> tuple[float, float, float, float]:
    """Return what Adam needs in a step, counted from 0: weights of the new gradient in both moments, the step size
    divided by the bias of the first moment, and one over the bias of the second.
    """
    first, second = betas
    return 1 - first, 1 - second, rate / (1 - first ** (step + 1)), 1 / (1 - second ** (step + 1))


def adam_step(value: Tensor, first: Tensor, second: Tensor, gradient: Tensor, pace: Tensor, epsilon: float) -> None:
    """Update `value` and its moments by `gradient`, float32 of one shape; `pace` is float32 `[4]` (`pace_of`).

    Moments of another dtype are rounded once they were used.
    """
    blend_first, blend_second, rate, unbias = pace.unbind()
    mean = first.float().lerp_(gradient, blend_first)
    square = second.float().lerp_(gradient.square(), blend_second)
    value.sub_((mean * rate).div_(square.mul(unbias).sqrt_().add_(epsilon)))
    if first.dtype != torch.float32:
        first.copy_(mean)
        second.copy_(square)
