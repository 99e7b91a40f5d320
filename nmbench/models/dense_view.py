"""The dense model beside the pruned one, without a second model: blocks compute with dense weights on request.

The live weights are set aside, not written: the tensors whose strictness was proven, and whose hash is compared after
the evaluation, are the very same ones before, during and after. One block at a time has its dense weights on the
device; where those on the host serve as they are (same device, same dtype), nothing is copied at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from nmbench.models.bundle import Bundle
from nmbench.models.hooks import hooks


class DenseView:
    """Lets `bundle`, pruned or not, compute with the dense weights in `copies`, by parameter name."""

    def __init__(self, bundle: Bundle, copies: Mapping[str, Tensor]) -> None:
        self.bundle = bundle
        self.copies = copies

    @contextlib.contextmanager
    def shown(self) -> Iterator[nn.Module]:
        """While the context is open, a forward pass of the model is that of the dense model, in the same dtype.

        A block is dense from the beginning to the end of its own forward pass; at other times its weights are the
        live ones.
        """
        blocks = self.bundle.blocks.items()
        swaps = [
            Swap(block, {n: self.copies[f"{name}.{n}"] for n, _ in block.named_parameters()}) for name, block in blocks
        ]
        # Whoever else moves the weights of a block does so further out: sets before, and puts back after.
        before = [swap.block.register_forward_pre_hook(swap.dense) for swap in swaps]
        after = [swap.block.register_forward_hook(swap.live, prepend=True, always_call=True) for swap in swaps]
        with hooks([*before, *after]):
            yield self.bundle.model


class Swap:
    """Exchanges the weights of one block: `dense` and `live` are hooks before and after its forward pass."""

    def __init__(self, block: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self.block = block
        self.weights = weights
        self.aside: list[tuple[nn.Parameter, Tensor]] = []  # parameters and their live weights

    def dense(self, block: nn.Module, args: Any) -> None:
        for name, parameter in block.named_parameters():
            self.aside.append((parameter, parameter.data))
            parameter.data = self.weights[name].to(parameter.device, parameter.dtype)

    def live(self, block: nn.Module, args: Any, output: Any) -> None:
        while self.aside:
            parameter, weight = self.aside.pop()
            parameter.data = weight
