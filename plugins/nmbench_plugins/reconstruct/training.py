"""The training of one part of a block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

import nmbench
from nmbench.pruning import in_passes, relative_error, rise_and_fall
from nmbench_plugins.reconstruct.steps import Steps


@dataclass(frozen=True)
class Plan:
    """Steps, step size, its rise, and the target of one training."""

    steps: int
    learning_rate: float
    warmup: float
    target: float

    def rate(self, step: int) -> float:
        """Return the step size of update `step`: a linear rise, then a linear fall to 0."""
        return self.learning_rate * rise_and_fall(step, self.steps, self.warmup)


def trained(
    block: nmbench.BlockTask, part: nmbench.Part, others: Mapping[str, Tensor], plan: Plan
) -> dict[str, Tensor]:
    """Return the trained tensors of a part, by name, in float32; none if the error of the part did not fall.

    `others`: parameters to train besides the kept weights.
    """
    targets = [part.target(number, plan.target).to(part.host) for number in range(part.batches)]
    start = {**{name: block.weights[name] for name in part.layers}, **others}
    masters = {name: tensor.detach().float().clone().requires_grad_() for name, tensor in start.items()}
    before = relative_error(part, targets, {})
    steps = Steps(part, targets, masters, {name: block.masks[name] for name in part.layers})
    for step, number in zip(range(plan.steps), in_passes(part.batches, block.generator), strict=False):
        steps.take(number, plan.rate(step))
        block.progress(step + 1, plan.steps)
    found = {name: kept(master, block.masks.get(name)) for name, master in masters.items()}
    after = relative_error(part, targets, found)
    inner = part.name.removeprefix(block.name).removeprefix(".")
    place = f" {inner}" if inner else ""
    block.report(**{f"error before{place}": before, f"error after{place}": min(before, after)})
    return found if after < before else {}


def kept(master: Tensor, mask: Tensor | None) -> Tensor:
    """Return a trained tensor with positive zeros off the mask."""
    tensor = master.detach()
    return tensor if mask is None else tensor.masked_fill(~mask, 0.0)
