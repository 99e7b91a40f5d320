"""Updates of the logits of the whole model; on a CUDA device one update of a minibatch is a CUDA graph, replayed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from nmbench.evaluation import Objective
from nmbench.pruning import Replay
from nmbench_plugins.soft.logits import Logits
from nmbench_plugins.soft.relaxed import Relaxed
from nmbench_plugins.soft.schedule import Setting

if TYPE_CHECKING:
    from nmbench.pruning import Training


class Steps:
    """Updates of `logits` by the objective of the whole model; `straight` and `seed` as for `Relaxed`."""

    def __init__(
        self, live: Training, logits: Logits, objective: Objective, straight: bool, seed: int, graph: bool = True
    ) -> None:
        self.live, self.logits, self.objective = live, logits, objective
        self.relaxed = Relaxed(logits, straight, seed)
        self.replay = Replay(live, objective, self._update, graph)

    def take(self, tokens: Tensor, setting: Setting) -> Tensor:
        """Update the logits by a minibatch `[n, window_tokens]`; return the objective by window, float32 `[n]`."""
        if self.replay.due:
            self.relaxed.pace.zero_()
            self.replay.capture(tokens)
        self.relaxed.set(setting)
        return self.replay(tokens)

    def show_greedy(self) -> None:
        """Make the greedy masks those of the live weights, until the next update."""
        self.live.apply({name: self.logits.greedy(name) for name in self.logits.values})

    def _update(self, tokens: Tensor) -> Tensor:
        for number, name in enumerate(self.logits.values):
            self.live.write(name, self.relaxed.weight(number, name, self.live.dense(name)))
        self.live.clear()
        losses = self.live.backward(tokens, self.objective)
        for number, name in enumerate(self.logits.values):
            self.relaxed.learn(number, name, self.live.dense(name), self.live.gradient(name))
        return losses
