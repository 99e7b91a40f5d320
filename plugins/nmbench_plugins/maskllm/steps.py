"""Updates of the gates.

The live weight of a layer is W * m. Its gradient G, from the backward pass of the model, gives that of the mask, G * W,
and the reward adds its own, -2 * reward * W^2 * m. The relaxation gives that of the gates. Nothing of the size of the
gates is stored besides their moments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nmbench.evaluation import Objective
from nmbench.pruning import MaskSteps, gumbel
from nmbench_plugins.maskllm.gates import Gates
from nmbench_plugins.maskllm.relaxation import as_rows, chosen, keys_gradient, members, soft_mask
from nmbench_plugins.maskllm.schedule import Setting

if TYPE_CHECKING:
    from nmbench.pruning import Training


class Steps(MaskSteps):
    """Updates of `gates`. `seed`: of the noise. `scales`: temperature, scale of the gates, and reward."""

    def __init__(self, live: Training, gates: Gates, objective: Objective, seed: int, graph: bool = True) -> None:
        super().__init__(live, objective, tuple(gates.values), 3, seed, graph)
        self.gates = gates

    def take(self, tokens: Tensor, setting: Setting) -> Tensor:
        """Update the gates by a minibatch `[n, window_tokens]`; return the objective by window, float32 `[n]`."""
        scales = setting.temperature, setting.scale, setting.reward
        return self.advance(tokens, setting.step, setting.rate, scales)

    def greedy(self, name: str) -> Tensor:
        """Return the mask of the largest gates of a layer, bool `[out, in]`."""
        return self.gates.greedy(name)

    def write_layer(self, number: int, name: str) -> None:
        """Write W * m of a layer into the model."""
        dense, candidates = self.live.dense(name), self.gates.of(name)
        weight = torch.empty_like(dense)
        for rows, groups in self.gates.parts(name):
            mask = soft_mask(self.shares(number, name, groups), candidates)
            weight[rows] = dense[rows] * as_rows(mask, dense.shape[1])
        self.live.write(name, weight)

    def learn_layer(self, number: int, name: str) -> None:
        """Update the gates of a layer by the gradient of its live weight."""
        dense, gradient, candidates = self.live.dense(name), self.live.gradient(name), self.gates.of(name)
        temperature, scale, reward = self.settings.scales.unbind()
        for rows, groups in self.gates.parts(name):
            shares, weight = self.shares(number, name, groups), members(dense[rows].float(), candidates.shape[1])
            kept = soft_mask(shares, candidates).mul_(weight)
            of_weight = members(gradient[rows].float(), candidates.shape[1]) - 2 * reward * kept
            change = keys_gradient(shares, of_weight * weight, candidates, temperature).mul_(scale)
            self.gates.update(name, groups, change, self.settings.pace)

    def shares(self, number: int, name: str, groups: slice) -> Tensor:
        """Return the shares of the patterns of some groups, `[C(M, N), groups]`, the same at every call in a step."""
        gates = self.gates.values[name][:, groups]
        noise = gumbel(self.settings.keys, number, groups.start * len(gates), torch.Size(reversed(gates.shape)))
        return chosen(noise.t() + gates * self.settings.scales[1], self.settings.scales[0])
