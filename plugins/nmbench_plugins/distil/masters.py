"""Float32 masters of the weights in training, and the masks that they have."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import nmbench

BELOW = 0.9  # of the smallest kept weight of a group: where its dropped masters begin


class Masters:
    """The masters of all layers, float32 `[out, in]` on the device of the model, by name.

    `living`: masters of dropped weights take part, so that `refresh` may choose them.
    """

    def __init__(self, task: nmbench.WeightTask, living: bool) -> None:
        self.patterns, self.living = task.pattern, living
        device = task.bundle.device
        self.masks = {name: mask.to(device, copy=True) for name, mask in task.initial.items()}
        self.tensors = {name: weight.to(device, torch.float32, copy=True) for name, weight in task.weights.items()}
        if living:
            for name, master in self.tensors.items():
                master += begun(task.dense[name].to(device).float(), master, self.masks[name], task.pattern[name])

    def masked(self, name: str) -> Tensor:
        """Return the master of a layer with positive zeros off the mask."""
        return self.tensors[name].masked_fill(~self.masks[name], 0.0)

    def gradient(self, name: str, gradient: Tensor, decay: float) -> Tensor:
        """Return the gradient of a master, float32, from that of the masked weight `[out, in]`."""
        gradient, mask = gradient.float(), self.masks[name]
        if not self.living:
            return gradient.mul_(mask)
        return gradient.add_(self.tensors[name].masked_fill(mask, 0.0), alpha=decay)

    def refresh(self) -> float:
        """Choose every mask anew by magnitude; return the share of all weights that changed sides."""
        changed = total = 0
        for name, master in self.tensors.items():
            mask = self.patterns[name].top(master.abs(), unit_power=2)
            changed += int((mask ^ self.masks[name]).sum())
            total += mask.numel()
            self.masks[name].copy_(mask)  # in place: a CUDA graph reads it
        return changed / total

    def pruned(self) -> dict[str, nmbench.Pruned]:
        """Return masks and masked masters."""
        return {name: nmbench.Pruned(self.masks[name], self.masked(name)) for name in self.tensors}

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Return masters and masks for a checkpoint."""
        return {"masters": self.tensors, "masks": self.masks}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on with the masters and masks of a checkpoint, in place."""
        for name, master in self.tensors.items():
            master.copy_(state["masters"][name])
            self.masks[name].copy_(state["masks"][name])


def begun(dense: Tensor, kept: Tensor, mask: Tensor, pattern: nmbench.Pattern) -> Tensor:
    """Return the first masters of dropped weights, 0 on the mask: dense, but below all kept ones of the group."""
    least = pattern.groups(kept.abs().masked_fill(~mask, torch.inf)).amin(dim=-1, keepdim=True)  # [out, groups, 1]
    most = (BELOW * least).expand_as(pattern.groups(kept)).reshape(kept.shape)
    return dense.clamp(-most, most).masked_fill(mask, 0.0)
