"""Float32 masters of the weights in training, and the moments of Adam.

Masters, because bfloat16 has no room for small steps. All layers of one pattern share one tensor, so that the operator
sees few, large tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

import nmbench
from nmbench.pruning import adam_step
from nmbench_plugins.proxsparse.operator import prox_

PART = {"cpu": 2**17, "cuda": 2**24}  # weights times N + 1 that the operator takes: the cache, or enough threads
BETAS = (0.9, 0.999)
EPSILON = 1e-8


class Masters:
    """The masters of all layers on the device of the model: `layers`, name -> float32 `[out, in]`, views of `whole`,
    pattern -> float32 `[weights]`.

    They begin at the dense weights; weights that the start drops begin at `shrink` times these.
    """

    def __init__(self, task: nmbench.LearnTask, shrink: float) -> None:
        self.patterns, device = task.pattern, task.bundle.device
        sizes = {name: math.prod(shape) for name, shape in task.layers.items()}
        self.whole = {
            pattern: torch.empty(sum(sizes[name] for name in named), device=device)
            for pattern, named in layers_of(task.pattern).items()
        }
        self.layers: dict[str, Tensor] = {}
        for pattern, named in layers_of(task.pattern).items():
            parts = self.whole[pattern].split([sizes[name] for name in named])
            self.layers.update({n: part.view(task.layers[n]) for n, part in zip(named, parts, strict=True)})
        self.first = {name: torch.zeros_like(master) for name, master in self.layers.items()}
        self.second = {name: torch.zeros_like(master) for name, master in self.layers.items()}
        self.begin(task, shrink)

    def begin(self, task: nmbench.LearnTask, shrink: float) -> None:
        """Begin anew, in place."""
        for name, master in self.layers.items():
            master.copy_(task.dense[name]).mul_(torch.where(task.initial[name].to(master.device), 1.0, shrink))
            self.first[name].zero_()
            self.second[name].zero_()

    def update(self, name: str, gradient: Tensor, pace: Tensor) -> None:
        """Take one step of Adam on a layer; `pace` is float32 `[4]` on the device (`pace_of`)."""
        adam_step(self.layers[name], self.first[name], self.second[name], gradient, pace, EPSILON)

    def penalise(self, lam: Mapping[nmbench.Pattern, float]) -> None:
        """Put the prox of every group in its place."""
        for pattern, whole in self.whole.items():
            weights = PART.get(whole.device.type, 2**24) // (pattern.keep + 1)
            groups = whole.view(-1, pattern.group)
            prox_(groups, lam[pattern], pattern.keep, max(1, weights // pattern.group))

    def masks(self) -> dict[str, Tensor]:
        """Return the masks of the largest masters, bool `[out, in]` in host memory."""
        return {name: self.patterns[name].top(master.abs()).cpu() for name, master in self.layers.items()}

    def sparse(self) -> float:
        """Return the share of groups that have at most N weights besides 0."""
        strict = total = 0
        for pattern, whole in self.whole.items():
            kept = pattern.kept(whole != 0)
            strict, total = strict + int((kept <= pattern.keep).sum()), total + kept.numel()
        return strict / total

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Return everything, for a checkpoint."""
        return {"masters": self.layers, "first": self.first, "second": self.second}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on with the tensors of a checkpoint, in place."""
        for key, own in self.state().items():
            for name, tensor in own.items():
                tensor.copy_(state[key][name])


def layers_of(patterns: Mapping[str, nmbench.Pattern]) -> dict[nmbench.Pattern, list[str]]:
    """Return the names of the layers of every pattern."""
    found: dict[nmbench.Pattern, list[str]] = {}
    for name, pattern in patterns.items():
        found.setdefault(pattern, []).append(name)
    return found
