"""The training of one part of a block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import nmbench
from nmbench.pruning import rise_and_fall
from nmbench_plugins.reconstruct.steps import Steps, squares

TINY = 1e-30  # of a sum of squares: a part whose target is 0 everywhere has the error 0


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
    whole = sum(float(target.float().square().sum(dtype=torch.float64)) for target in targets)
    before = error(part, targets, whole, {})
    steps = Steps(part, targets, masters, {name: block.masks[name] for name in part.layers})
    for step, number in zip(range(plan.steps), order(part.batches, block.generator), strict=False):
        steps.take(number, plan.rate(step))
        block.progress(step + 1, plan.steps)
    found = {name: kept(master, block.masks.get(name)) for name, master in masters.items()}
    after = error(part, targets, whole, found)
    inner = part.name.removeprefix(block.name).removeprefix(".")
    place = f" {inner}" if inner else ""
    block.report(**{f"error before{place}": before, f"error after{place}": min(before, after)})
    return found if after < before else {}


def order(count: int, generator: torch.Generator) -> Iterator[int]:
    """Yield numbers of batches without end, each once in every pass."""
    while True:
        yield from torch.randperm(count, generator=generator, device=generator.device).tolist()


@torch.no_grad()
def error(part: nmbench.Part, targets: Sequence[Tensor], whole: float, tensors: Mapping[str, Tensor]) -> float:
    """Return the sum of squared errors over all batches, as a share of `whole`, the sum of squares of the targets."""
    wrong = sum(squares(part, i, target, tensors).sum(dtype=torch.float64) for i, target in enumerate(targets))
    return float(wrong) / max(whole, TINY)


def kept(master: Tensor, mask: Tensor | None) -> Tensor:
    """Return a trained tensor with positive zeros off the mask."""
    tensor = master.detach()
    return tensor if mask is None else tensor.masked_fill(~mask, 0.0)
