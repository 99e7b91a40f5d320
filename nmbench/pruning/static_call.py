"""A call whose tensors stay where they are, so that a CUDA graph captured with them can be fed with other batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nmbench.calibration.arguments import changed, tensors_of
from nmbench.pruning.block_parts import Call


class StaticCall:
    """A copy of the arguments of `call` on `device`, in tensors that `load` overwrites."""

    def __init__(self, call: Call, device: torch.device) -> None:
        self.batch, self.device = call.batch, device
        self.args, self.kwargs = changed((call.args, call.kwargs), lambda tensor: tensor.to(device, copy=True))
        self.form = form(call)

    def again(self, module: Callable[..., Any], keep: bool = False) -> Any:
        """Return what `module` makes of the arguments."""
        return module(*self.args, **self.kwargs)

    def takes(self, call: Call) -> bool:
        """Return True if `call` has tensors of the same shapes and dtypes in the same places."""
        return form(call) == self.form

    def load(self, call: Call) -> None:
        """Overwrite the tensors with those of another call of the same form."""
        own, other = tensors_of((self.args, self.kwargs)), tensors_of((call.args, call.kwargs))
        for mine, theirs in zip(own, other, strict=True):
            mine.copy_(theirs, non_blocking=True)


def form(call: Call) -> list[tuple[torch.Size, torch.dtype]]:
    """Return the shapes and dtypes of the tensors of a call."""
    tensors: list[Tensor] = list(tensors_of((call.args, call.kwargs)))
    return [(tensor.shape, tensor.dtype) for tensor in tensors]
