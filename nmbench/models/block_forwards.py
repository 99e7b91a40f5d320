"""Passes that run in place of those of blocks: recomputed where gradients are wanted, or compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nmbench.models.hooks import instead


@contextlib.contextmanager
def running(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """While the context is open, modules have the forward passes in `forwards`; their hooks stay outside of these."""
    with contextlib.ExitStack() as stack:
        for block, forward in forwards.items():
            stack.enter_context(instead(block, forward))
        yield


def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward pass that keeps its inputs alone and is repeated when gradients are wanted, which are equal.

    The pass draws no random numbers.
    """

    def repeated(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return repeated


def compiled(work: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """Return `work` with the steps between its matrix products fused by torch.compile, at its first call for every
    shape of its inputs. Blocks of one class share what was compiled.
    """
    function: Callable[..., Any] = torch.compile(work, backend=backend, dynamic=False)
    return function
