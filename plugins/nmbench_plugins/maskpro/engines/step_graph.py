"""CUDA graphs of a step: a graph is recorded once and replayed without launch overhead, and the host never waits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

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
