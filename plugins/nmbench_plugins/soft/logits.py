"""Logits of all layers, one a unit (in most patterns a weight), and the moments of Adam."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

import nmbench
from nmbench.pruning import adam_step
from nmbench_plugins.soft.prior import lead_of

PART = {"cpu": 2**17, "cuda": 2**23}  # weights times rounds that are computed at once: the cache, or enough threads
EPSILON = 1e-8


class Logits:
    """Logits, float32, and moments, of dtype `moments`, by layer: `[out, units]` on `device`.

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
        kept = {name: mask.to(device)[:, :: patterns[name].unit] for name, mask in start.items()}
        self.values = {name: units.float().mul_(leads[patterns[name]]) for name, units in kept.items()}
        self.first = {name: torch.zeros_like(value, dtype=moments) for name, value in self.values.items()}
        self.second = {name: torch.zeros_like(value, dtype=moments) for name, value in self.values.items()}

    def parts(self, name: str) -> Iterator[slice]:
        """Yield the rows of a layer, as many at once as bound the memory of the computation."""
        rows, units = self.values[name].shape
        at_once = max(1, PART.get(self.values[name].device.type, 2**23) // (units * self.patterns[name].units.keep))
        return (slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once))

    def greedy(self, name: str) -> Tensor:
        """Return the mask of the largest logits of a layer, bool `[out, in]`."""
        return torch.cat([self.greedy_rows(name, rows) for rows in self.parts(name)])

    def greedy_rows(self, name: str, rows: slice) -> Tensor:
        """Return that mask for some rows, bool `[rows, in]`."""
        pattern = self.patterns[name]
        return pattern.whole(pattern.units.top_of_finite(self.values[name][rows]))

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
