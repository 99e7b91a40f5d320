"""Updates of the logits of the whole model; on a CUDA device one update of a minibatch is a CUDA graph, replayed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from nmbench.evaluation import Objective
from nmbench.pruning import MaskSteps
from nmbench_plugins.soft.logits import Logits
from nmbench_plugins.soft.relaxed import SCALES, Relaxed
from nmbench_plugins.soft.schedule import Setting

if TYPE_CHECKING:
    from nmbench.pruning import Training


class Steps(MaskSteps):
    """Updates of `logits` by the objective of the whole model; `straight` as for `Relaxed`, `seed` of the noise."""

    def __init__(
        self, live: Training, logits: Logits, objective: Objective, straight: bool, seed: int, graph: bool = True
    ) -> None:
        super().__init__(live, objective, tuple(logits.values), SCALES, seed, graph)
        self.logits = logits
        self.relaxed = Relaxed(logits, straight, self.settings)

    def take(self, tokens: Tensor, setting: Setting) -> Tensor:
        """Update the logits by a minibatch `[n, window_tokens]`; return the objective by window, float32 `[n]`."""
        return self.advance(tokens, setting.step, setting.rate, (setting.temperature, setting.noise))

    def greedy(self, name: str) -> Tensor:
        """Return the mask of the largest logits of a layer, bool `[out, in]`."""
        return self.logits.greedy(name)

    def write_layer(self, number: int, name: str) -> None:
        """Write W * m of a layer into the model."""
        self.live.write(name, self.relaxed.weight(number, name, self.live.dense(name)))

    def learn_layer(self, number: int, name: str) -> None:
        """Update the logits of a layer by the gradient of its live weight."""
        self.relaxed.learn(number, name, self.live.dense(name), self.live.gradient(name))
