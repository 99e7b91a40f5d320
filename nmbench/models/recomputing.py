"""Recomputation of blocks in the backward pass: only the inputs of blocks are kept, at the price of a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from nmbench.models.hooks import instead


@contextlib.contextmanager
def recomputing(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """While the context is open, `blocks` keep no activations for the backward pass; gradients are the same."""
    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.enter_context(instead(block, recomputed(block.forward)))
        yield


def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward pass that is repeated when its gradients are wanted."""

    def repeated(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return repeated
