"""A step recorded once as a CUDA graph and replayed: no launch overhead, nothing waits for the host."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import masking_utils

from nmbench.runtime import graph_of


@dataclass(frozen=True)
class Recorded:
    """A CUDA graph that reads its minibatch from two buffers."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    references: Tensor

    def replay(self, tokens: Tensor, references: Tensor) -> None:
        """Run the step on another minibatch of the same shape."""
        self.tokens.copy_(tokens)
        self.references.copy_(references)
        self.graph.replay()


def record(
    step: Callable[[Tensor, Tensor], None], tokens: Tensor, references: Tensor, state: Iterable[Tensor]
) -> Recorded:
    """Record `step(tokens, references)`, which is not run but for warming up; the tensors in `state` are put back.

    Raises `RuntimeError` if the step does what a graph cannot hold.
    """
    tokens, references, state = tokens.clone(), references.clone(), list(state)
    before = [tensor.clone() for tensor in state]

    def put_back() -> None:
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)

    return Recorded(graph_of(lambda: step(tokens, references), put_back), tokens, references)


@contextlib.contextmanager
def unpacked_windows() -> Iterator[None]:
    """Tell transformers that no window holds several texts behind each other.

    It finds out by asking the device in every forward pass, which waits for it; while a graph is recorded it cannot
    ask, and computes with an explicit mask where a causal kernel does the same several times faster.
    """
    name = "find_packed_sequence_indices"
    found = getattr(masking_utils, name, None)
    if found is None:  # another release of transformers: right without, and slower
        yield
        return
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, found)
