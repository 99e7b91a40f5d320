"""Updates of the masks of all layers by one minibatch, layer by layer, as learners by gradients take them.

The live weight of a layer is its dense weight times a soft mask. The backward pass of the model gives the gradient of
the live weight, and the learner takes that to its logits by a formula. So autograd never sees the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nmbench.evaluation.objective import Objective
from nmbench.pruning.adam import pace_of
from nmbench.pruning.around_passes import AroundPasses
from nmbench.pruning.noise import step_keys
from nmbench.pruning.replay import Replay
from nmbench.pruning.training import Training


class StepSettings:
    """The settings that change from step to step, in tensors on `device` that a CUDA graph reads: `keys` int32 `[2]` of
    the noise (`gumbel`), `scales` float32 `[n]` of the learner, `pace` float32 `[4]` of Adam (`adam_step`).

    `seed`: of the noise.
    """

    def __init__(self, device: torch.device, scales: int, seed: int) -> None:
        self.seed = seed
        self.keys = torch.zeros(2, dtype=torch.int32, device=device)
        self.scales = torch.ones(scales, device=device)
        self.pace = torch.zeros(4, device=device)

    def begin(self, step: int, rate: float, scales: Sequence[float]) -> None:
        """Begin step `step`, counted from 0, at the step size `rate`."""
        for target, values in ((self.keys, step_keys(self.seed, step)), (self.scales, scales)):
            target.copy_(torch.tensor(values, dtype=target.dtype))
        self.pace.copy_(torch.tensor(pace_of(rate, step)))

    def hold(self) -> None:
        """Let steps change nothing until the next one begins, as while a CUDA graph is captured."""
        self.pace.zero_()


class MaskSteps:
    """Base of the updates of one learner; a subclass implements `write_layer`, `learn_layer` and `greedy`.

    On a CUDA device an update is a CUDA graph, or two around compiled passes, which read the `settings` of the step.
    `names`: the layers; the number of a layer is its place among them. `scales`: their number. `seed`: of the noise.
    """

    def __init__(
        self, live: Training, objective: Objective, names: Sequence[str], scales: int, seed: int, graph: bool = True
    ) -> None:
        self.live, self.objective, self.names = live, objective, tuple(names)
        self.settings = StepSettings(live.bundle.device, scales, seed)
        self.replay = Replay(live, objective, self._update, graph)
        self.around = AroundPasses(live, self._write, self._learn, graph)

    def write_layer(self, number: int, name: str) -> None:
        """Set the live weight of a layer to its dense weight times the soft mask of this step."""
        raise NotImplementedError

    def learn_layer(self, number: int, name: str) -> None:
        """Take the step of Adam on the logits of a layer, by the gradient of its live weight."""
        raise NotImplementedError

    def greedy(self, name: str) -> Tensor:
        """Return the strict mask of the present logits of a layer, bool `[out, in]` on the device."""
        raise NotImplementedError

    def advance(self, tokens: Tensor, step: int, rate: float, scales: Sequence[float]) -> Tensor:
        """Take update `step`, counted from 0, by a minibatch `[n, window_tokens]` at the step size `rate`.

        Returns the objective by window under the soft masks, float32 `[n]`.
        """
        if self.replay.due:
            self.settings.hold()
            self.replay.capture(tokens)
        if self.around.due:
            self.settings.hold()
            self.around.capture()
        self.settings.begin(step, rate, scales)
        return self.replay(tokens)

    def masks(self) -> dict[str, Tensor]:
        """Return the strict masks of all layers, on the device."""
        return {name: self.greedy(name) for name in self.names}

    def _update(self, tokens: Tensor) -> Tensor:
        self.around.before()
        losses = self.live.backward(tokens, self.objective)
        self.around.after()
        return losses

    def _write(self) -> None:
        for number, name in enumerate(self.names):
            self.write_layer(number, name)

    def _learn(self) -> None:
        for number, name in enumerate(self.names):
            self.learn_layer(number, name)
