"""Gates of all layers, one for every pattern of every group, and the moments of Adam."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

import nmbench
from nmbench.pruning import adam_step
from nmbench_plugins.maskllm.candidates import candidates
from nmbench_plugins.maskllm.prior import lead_of
from nmbench_plugins.maskllm.relaxation import members

PART = {"cpu": 2**17, "cuda": 2**23}  # gates that are computed at once: the cache, or enough threads
EPSILON = 1e-5  # of Adam, as in the paper


class Gates:
    """Gates, float32, and moments, of dtype `moments`, by layer: `[C(M, N), groups]` on the device of the model.

    They begin at the masks of the start: a group leaves it with probability `leave` in a draw at `scale`.
    """

    def __init__(
        self, task: nmbench.LearnTask, leave: float, scale: float, moments: torch.dtype = torch.float32
    ) -> None:
        self.shapes, self.patterns, device = task.layers, task.pattern, task.bundle.device
        self.candidates = {pattern: candidates(pattern).to(device) for pattern in set(self.patterns.values())}
        self.values = {}
        for name, pattern in self.patterns.items():
            kept = members(task.initial[name].to(device).float(), pattern.group)  # [M, groups]
            self.values[name] = (self.of(name) @ kept).mul_(lead_of(pattern, leave) / (scale * pattern.unit))
        self.first = {name: torch.zeros_like(value, dtype=moments) for name, value in self.values.items()}
        self.second = {name: torch.zeros_like(value, dtype=moments) for name, value in self.values.items()}

    def of(self, name: str) -> Tensor:
        """Return the candidates of a layer, `[C(M, N), M]`."""
        return self.candidates[self.patterns[name]]

    def parts(self, name: str) -> Iterator[tuple[slice, slice]]:
        """Yield the rows of a layer and their groups, as many at once as bound the memory of the computation."""
        rows, inputs = self.shapes[name]
        each = inputs // self.patterns[name].group  # groups of a row
        at_once = max(1, PART.get(self.values[name].device.type, 2**23) // (each * len(self.of(name))))
        for start in range(0, rows, at_once):
            end = min(start + at_once, rows)
            yield slice(start, end), slice(start * each, end * each)

    def greedy(self, name: str) -> Tensor:
        """Return the mask of the patterns with the largest gates, bool `[out, in]`; of equal gates the first."""
        best = self.values[name].argmax(dim=0)  # [groups]
        return self.of(name).bool()[best].reshape(self.shapes[name])

    def update(self, name: str, groups: slice, gradient: Tensor, pace: Tensor) -> None:
        """Take one step of Adam on gates `[C(M, N), groups]` of a layer; `pace` is float32 `[4]` on the device."""
        tensors = self.values[name][:, groups], self.first[name][:, groups], self.second[name][:, groups]
        adam_step(*tensors, gradient, pace, EPSILON)

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Return everything, for a checkpoint."""
        return {"gates": self.values, "first": self.first, "second": self.second}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on with the tensors of a checkpoint, in place."""
        for name in self.values:
            self.values[name].copy_(state["gates"][name])
            self.first[name].copy_(state["first"][name])
            self.second[name].copy_(state["second"][name])
