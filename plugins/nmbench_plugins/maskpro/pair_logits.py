"""The logits of all layers when two masks are drawn from them in a step: see `pair_tracker` for what moves them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import nmbench
from nmbench_plugins.maskpro import policy
from nmbench_plugins.maskpro.logits import Drawn, Logits


class PairLogits(Logits):
    """Where a draw leaves its gradient behind, there is room for two."""

    spare: dict[nmbench.Pattern, Tensor]  # [groups, group], gradients of the mask drawn before the last one

    @classmethod
    def prior(cls, task: nmbench.LearnTask, prior: float) -> PairLogits:
        logits = super().prior(task, prior)
        assert isinstance(logits, PairLogits)
        logits.spare = {pattern: torch.empty_like(gradient) for pattern, gradient in logits.gradients.items()}
        return logits

    def draw_pair(self, generator: torch.Generator) -> tuple[Drawn, Drawn]:
        """Draw two independent masks, A and B."""
        a = self.draw(generator)
        self.gradients, self.spare = self.spare, self.gradients
        return a, self.draw(generator)

    def step_pair(self, a: Drawn, b: Drawn, scale: Mapping[str, Tensor]) -> None:
        """logits += scale * (grad log P(a) - grad log P(b)), the pair drawn last; `scale` by layer, float32 `[out]`."""
        factors = self._by_group(scale)
        for pattern, logits in self.flat.items():
            slope = self._slope(pattern, a, self.spare) - self._slope(pattern, b, self.gradients)  # [groups, group]
            logits.addcmul_(slope, factors[pattern][:, None])

    def _slope(self, pattern: nmbench.Pattern, drawn: Drawn, known: Mapping[nmbench.Pattern, Tensor]) -> Tensor:
        if pattern in known:
            return known[pattern]
        return policy.grad_log_prob(self.flat[pattern], drawn.by_pattern[pattern])

    def _by_group(self, scale: Mapping[str, Tensor]) -> dict[nmbench.Pattern, Tensor]:
        """The factor of every group, float32 `[groups]` by pattern, from that of its row."""
        parts: dict[nmbench.Pattern, list[Tensor]] = {}
        for name, (_, inputs) in self.task.layers.items():
            pattern = self.task.pattern[name]
            parts.setdefault(pattern, []).append(scale[name].repeat_interleave(inputs // pattern.group))
        return {pattern: torch.cat(layers) for pattern, layers in parts.items()}
