"""Errors of the outputs of a part against their targets, and the order in which a training reads the batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from nmbench.pruning.block_parts import Part

TINY = 1e-30  # of a sum of squares: a part whose target is 0 everywhere has the error 0


def squared_errors(part: Part, number: int, target: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the squared errors of a batch in float32, of the shape of the outputs; `tensors` as for `Part.outputs`."""
    output = part.outputs(number, tensors)
    return (output.float() - target.to(output.device).float()).square()


@torch.no_grad()
def relative_error(part: Part, targets: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> float:
    """Return the sum of squared errors over all batches, as a share of the sum of squares of the targets."""
    device = next(part.module.parameters()).device
    whole = sum(float(target.to(device).float().square().sum(dtype=torch.float64)) for target in targets)
    wrong = sum(
        squared_errors(part, number, target, tensors).sum(dtype=torch.float64) for number, target in enumerate(targets)
    )
    return float(wrong) / max(whole, TINY)


def in_passes(count: int, generator: torch.Generator) -> Iterator[int]:
    """Yield the numbers below `count` without end, each once in every pass, in random order."""
    while True:
        yield from torch.randperm(count, generator=generator, device=generator.device).tolist()
