"""CUDA graphs of a step: a graph is recorded once and replayed without launch overhead, and the host never waits."""

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
    """Record `step(tokens, references)` as a CUDA graph.

    The step runs only to warm up; afterwards the tensors in `state` have their old values. Raises `RuntimeError` if the
    step does something that a CUDA graph cannot hold.
    """
    tokens, references, state = tokens.clone(), references.clone(), list(state)
    before = [tensor.clone() for tensor in state]

    def put_back() -> None:
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)

    return Recorded(graph_of(lambda: step(tokens, references), put_back), tokens, references)


@contextlib.contextmanager
def ignoring_packed_windows() -> Iterator[None]:
    """Set transformers to treat every window as one text while the context is open.

    In each forward pass transformers reads position numbers back from the device to find windows that pack several
    texts, and the host waits. While a graph is recorded nothing can be read back; transformers then computes with an
    explicit mask, where a causal kernel is several times faster with the same result.
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
