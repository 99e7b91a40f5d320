"""Forward passes of the dense model without a second model: hooks swap dense weights into one block at a time.

The swap exchanges tensors and writes into none. So the tensors whose strictness was proven, and whose hash is compared
after the evaluation, stay the same objects. Only the block that computes has its dense weights on the device. If the
dense copies have the device and dtype of the block, the swap copies nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from nmbench.models.bundle import Bundle
from nmbench.models.hooks import hooks


class DenseView:
    """Forward passes of `bundle`, pruned or not, with the dense weights in `copies` (parameter name -> tensor)."""

    def __init__(self, bundle: Bundle, copies: Mapping[str, Tensor]) -> None:
        self.bundle = bundle
        self.copies = copies

    @contextlib.contextmanager
    def shown(self) -> Iterator[nn.Module]:
        """Make forward passes those of the dense model, in the same dtype, while the context is open.

        A block has dense weights during its own forward pass, and its live weights at all other times.
        """
        blocks = self.bundle.blocks.items()
        swaps = [
            Swap(block, {n: self.copies[f"{name}.{n}"] for n, _ in block.named_parameters()}) for name, block in blocks
        ]
        # The hooks of offloading also exchange weights. Theirs must enclose these: first before a pass, last after it.
        before = [swap.block.register_forward_pre_hook(swap.dense) for swap in swaps]
        after = [swap.block.register_forward_hook(swap.live, prepend=True, always_call=True) for swap in swaps]
        with hooks([*before, *after]):
            yield self.bundle.model


class Swap:
    """Exchange of the weights of one block: `dense` is its forward pre-hook, `live` its forward hook."""

    def __init__(self, block: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self.block = block
        self.weights = weights
        self.saved: list[tuple[nn.Parameter, Tensor]] = []  # parameters and their live weights

    def dense(self, block: nn.Module, args: Any) -> None:
        for name, parameter in block.named_parameters():
            self.saved.append((parameter, parameter.data))
            parameter.data = self.weights[name].to(parameter.device, parameter.dtype)

    def live(self, block: nn.Module, args: Any, output: Any) -> None:
        while self.saved:
            parameter, weight = self.saved.pop()
            parameter.data = weight
