"""Logits of all layers, one a weight, and the moments of Adam."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

import nmbench
from nmbench.pruning import adam_step
from nmbench_plugins.soft.prior import lead_of
from nmbench_plugins.soft.relaxation import as_rows, columns, greedy

PART = {"cpu": 2**17, "cuda": 2**23}  # weights times rounds that are computed at once: the cache, or enough threads
EPSILON = 1e-8


class Logits:
    """Logits, float32, and moments, of dtype `moments`, by layer: `[out, in]` on `device`.

    They begin at `start`, name -> bool mask; a group leaves it with probability `leave` in a draw at noise scale
    `noise`.
    """

    def __init__(
        self,
        patterns: Mapping[str, nmbench.Pattern],
        start: Mapping[str, Tensor],
        device: torch.device,
        leave: float,
        noise: float,
        moments: torch.dtype = torch.float32,
    ) -> None:
        self.patterns, self.device = patterns, device
        leads = {pattern: noise * lead_of(pattern, leave) for pattern in set(patterns.values())}
        self.values = {name: mask.to(device).float().mul_(leads[patterns[name]]) for name, mask in start.items()}
        self.first = {name: torch.zeros_like(value, dtype=moments) for name, value in self.values.items()}
        self.second = {name: torch.zeros_like(value, dtype=moments) for name, value in self.values.items()}

    def parts(self, name: str) -> Iterator[slice]:
        """Yield the rows of a layer, as many at once as bound the memory of the computation."""
        rows, inputs = self.values[name].shape
        at_once = max(1, PART.get(self.values[name].device.type, 2**23) // (inputs * self.patterns[name].keep))
        return (slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once))

    def greedy(self, name: str) -> Tensor:
        """Return the mask of the largest logits of a layer, bool `[out, in]`."""
        pattern = self.patterns[name]
        parts = (self.values[name][rows] for rows in self.parts(name))
        return torch.cat([as_rows(greedy(columns(part, pattern.group), pattern.keep), part.shape) for part in parts])

    def update(self, name: str, rows: slice, gradient: Tensor, pace: Tensor) -> None:
        """Take one step of Adam on rows of a layer; `pace` is float32 `[4]` on the device (`pace_of`)."""
        tensors = self.values[name][rows], self.first[name][rows], self.second[name][rows]
        adam_step(*tensors, gradient, pace, EPSILON)

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Return everything, for a checkpoint."""
        return {"logits": self.values, "first": self.first, "second": self.second}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on with the tensors of a checkpoint, in place."""
        for name in self.values:
            self.values[name].copy_(state["logits"][name])
            self.first[name].copy_(state["first"][name])
            self.second[name].copy_(state["second"][name])
