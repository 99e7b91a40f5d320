"""One step's arithmetic on layers: from logits to live weights, and from the gradients of these back to the logits.

The live weight of a layer is W * m. Its gradient G gives that of the mask, G * W, and the relaxation gives that of the
logits. So autograd never sees the logits, and nothing of their size is stored besides the moments. Both scopes, the
whole model and one block, share this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nmbench.pruning import StepSettings, gumbel
from nmbench_plugins.soft.kernels import launch
from nmbench_plugins.soft.logits import EPSILON, Logits
from nmbench_plugins.soft.relaxation import as_rows, columns, soft_mask, soft_mask_gradient

SCALES = 2  # temperature and noise scale


class Relaxed:
    """The masks of the layers of `logits` in one step. `straight`: they are the greedy masks, without noise, and the
    gradient of the mask is taken for that of the logits. `settings`: of the step, with temperature and noise scale.
    """

    def __init__(self, logits: Logits, straight: bool, settings: StepSettings) -> None:
        self.logits, self.straight = logits, straight
        self.device = logits.device
        self.keys, self.scales, self.pace = settings.keys, settings.scales, settings.pace

    def weight(self, number: int, name: str, dense: Tensor) -> Tensor:
        """Return W * m of a layer, `[out, in]` in the dtype of the `dense` weight; `number`: of the layer."""
        logits, pattern = self.logits.values[name], self.logits.patterns[name]
        weight = torch.empty_like(dense)
        if not self.straight and launch.usable(pattern, self.device, dense, weight):
            launch.write(logits, dense, weight, pattern, self.keys, self.scales, number)
            return weight
        for rows in self.logits.parts(name):
            torch.mul(dense[rows], self._mask(number, name, rows), out=weight[rows])
        return weight

    def learn(self, number: int, name: str, dense: Tensor, gradient: Tensor) -> None:
        """Update the logits of a layer by the `gradient` of its live weight, `[out, in]`."""
        pattern = self.logits.patterns[name]
        if not self.straight and launch.usable(pattern, self.device, dense, gradient):
            state = self.logits.values[name], self.logits.first[name], self.logits.second[name]
            launch.learn(*state, dense, gradient, pattern, self.keys, self.scales, self.pace, EPSILON, number)
            return
        for rows in self.logits.parts(name):
            slope = gradient[rows].float() * dense[rows].float()
            slope = pattern.by_unit(slope).sum(dim=-1) if pattern.unit > 1 else slope  # [rows, units]
            self.logits.update(name, rows, self._gradient(number, name, rows, slope), self.pace)

    def _mask(self, number: int, name: str, rows: slice) -> Tensor:
        """Return the mask of rows of a layer, float32 or bool `[rows, in]`."""
        if self.straight:
            return self.logits.greedy_rows(name, rows)
        pattern, shape = self.logits.patterns[name], self.logits.values[name][rows].shape
        mask = soft_mask(self._drawn(number, name, rows), self.scales[0], pattern.units.keep)
        return pattern.whole(as_rows(mask, shape))

    def _gradient(self, number: int, name: str, rows: slice, slope: Tensor) -> Tensor:
        """Return the gradient of the logits, `[rows, units]`, from that of the mask of units."""
        if self.straight:
            return slope
        pattern, keys = self.logits.patterns[name], self._drawn(number, name, rows)
        slopes = columns(slope, pattern.units.group)
        gradient = soft_mask_gradient(keys, self.scales[0], pattern.units.keep, slopes)
        return as_rows(gradient, slope.shape).div_(self.scales[1])

    def _drawn(self, number: int, name: str, rows: slice) -> Tensor:
        """Return logits / lam + Gumbel noise of rows, `[group, groups]`, the same at every call in a step."""
        logits = self.logits.values[name]
        noise = gumbel(self.keys, number, rows.start * logits.shape[1], logits[rows].shape)
        return columns(noise.add_(logits[rows] / self.scales[1]), self.logits.patterns[name].units.group)
