"""Updates of the logits; on a CUDA device one update of a whole minibatch is a CUDA graph, replayed.

The live weight of a layer is W * m. Its gradient G, from the backward pass of the model, gives that of the mask, G * W,
and the relaxation gives that of the logits. So autograd never sees the logits, and nothing of their size is stored
besides the moments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nmbench.evaluation import Objective
from nmbench.pruning import MaskSteps, gumbel
from nmbench_plugins.soft.kernels import launch
from nmbench_plugins.soft.logits import EPSILON, Logits
from nmbench_plugins.soft.relaxation import as_rows, columns, greedy, soft_mask, soft_mask_gradient
from nmbench_plugins.soft.schedule import Setting

if TYPE_CHECKING:
    from nmbench.pruning import Training


class Steps(MaskSteps):
    """Updates of `logits`. `straight`: the forward pass has the greedy mask, and the gradient of the mask is taken for
    that of the logits, without noise. `seed`: of the noise. `scales`: temperature and noise scale.
    """

    def __init__(
        self, live: Training, logits: Logits, objective: Objective, straight: bool, seed: int, graph: bool = True
    ) -> None:
        super().__init__(live, objective, tuple(logits.values), 2, seed, graph)
        self.logits, self.straight = logits, straight

    def take(self, tokens: Tensor, setting: Setting) -> Tensor:
        """Update the logits by a minibatch `[n, window_tokens]`; return the objective by window, float32 `[n]`."""
        return self.advance(tokens, setting.step, setting.rate, (setting.temperature, setting.noise))

    def greedy(self, name: str) -> Tensor:
        """Return the mask of the largest logits of a layer, bool `[out, in]`."""
        return self.logits.greedy(name)

    def write_layer(self, number: int, name: str) -> None:
        """Write W * m of a layer into the model."""
        dense, logits, pattern = self.live.dense(name), self.logits.values[name], self.logits.patterns[name]
        weight = torch.empty_like(dense)
        if not self.straight and launch.usable(pattern, self.device, dense, weight):
            launch.write(logits, dense, weight, pattern, self.keys, self.scales, number)
            self.live.write(name, weight)
            return
        for rows in self.logits.parts(name):
            weight[rows] = dense[rows] * self._mask(number, name, rows)
        self.live.write(name, weight)

    def learn_layer(self, number: int, name: str) -> None:
        """Update the logits of a layer by the gradient of its live weight."""
        dense, gradient, pattern = self.live.dense(name), self.live.gradient(name), self.logits.patterns[name]
        if not self.straight and launch.usable(pattern, self.device, dense, gradient):
            state = self.logits.values[name], self.logits.first[name], self.logits.second[name]
            launch.learn(*state, dense, gradient, pattern, self.keys, self.scales, self.pace, EPSILON, number)
            return
        for rows in self.logits.parts(name):
            slope = gradient[rows].float() * dense[rows].float()
            self.logits.update(name, rows, self._gradient(number, name, rows, slope), self.pace)

    def _mask(self, number: int, name: str, rows: slice) -> Tensor:
        """Return the mask of rows of a layer, float32 `[rows, in]`."""
        pattern, shape = self.logits.patterns[name], self.logits.values[name][rows].shape
        if self.straight:
            logits = columns(self.logits.values[name][rows], pattern.group)
            return as_rows(greedy(logits, pattern.keep), shape).float()
        return as_rows(soft_mask(self._drawn(number, name, rows), self.scales[0], pattern.keep), shape)

    def _gradient(self, number: int, name: str, rows: slice, slope: Tensor) -> Tensor:
        """Return the gradient of the logits, `[rows, in]`, from that of the mask."""
        if self.straight:
            return slope
        pattern, keys = self.logits.patterns[name], self._drawn(number, name, rows)
        gradient = soft_mask_gradient(keys, self.scales[0], pattern.keep, columns(slope, pattern.group))
        return as_rows(gradient, slope.shape).div_(self.scales[1])

    def _drawn(self, number: int, name: str, rows: slice) -> Tensor:
        """Return logits / lam + Gumbel noise of rows, `[group, groups]`, the same at every call in a step."""
        logits = self.logits.values[name]
        noise = gumbel(self.keys, number, rows.start * logits.shape[1], logits[rows].shape)
        return columns(noise.add_(logits[rows] / self.scales[1]), self.logits.patterns[name].group)
