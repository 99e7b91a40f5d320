"""Layers on which the kernels of MaskPro are tried, by their programs and by the reference."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from nmbench_plugins.maskpro.kernels import launch, reference


class Layer:
    """One layer in the middle of larger buffers, whose borders must not be written to."""

    def __init__(
        self, shape: tuple[int, int], logits: Tensor, weight: Tensor, programs: Any = None, device: str = "cpu"
    ) -> None:
        self.programs = programs  # None: compiled for a GPU
        self.logits = self._inside(logits.reshape(shape).to(device))
        self.weight = weight.reshape(shape).to(device)
        self.out = self._inside(torch.full(shape, torch.nan, dtype=weight.dtype, device=device))
        # The interpreter runs block after block: few large ones, but not larger than the layer.
        self.launch = launch.Launch(block=max(128, min(4096, 2 ** (logits.numel() // 8).bit_length())))

    def _inside(self, values: Tensor) -> Tensor:
        buffer = torch.full((values.numel() + 32,), 77.0, dtype=values.dtype, device=values.device)
        return buffer[16:-16].copy_(values.view(-1)).view(values.shape)

    def step(self, pattern, step: int, scale: Tensor, update: bool = True, draw: bool = True, seed: int = 2**63 + 9):
        self.out.fill_(torch.nan)
        self._call(launch.step)(
            *pattern, seed=seed, first_group=5, scale=scale.to(self.logits.device), update=update, draw=draw,
            step=torch.tensor([step], device=self.logits.device), launch=self.launch, programs=self.programs,
        )  # fmt: skip

    def reference_step(
        self, pattern, step: int, scale: Tensor, update: bool = True, draw: bool = True, seed: int = 2**63 + 9
    ):
        self.out.fill_(torch.nan)
        self._call(reference.step)(
            *pattern, seed=seed, first_group=5, scale=scale, update=update, draw=draw, step=torch.tensor([step])
        )

    def _call(self, function):
        return partial(function, self.logits, self.weight, self.out)

    def kept(self) -> Tensor:
        """The mask as the masked weights show it; no weight is 0."""
        return self.out.cpu().ne(0)

    def borders(self) -> Tensor:
        return torch.stack(
            [b._base[i].cpu().float() for b in (self.logits, self.out) for i in (slice(16), slice(-16, None))]
        )


def make_logits(kind: str, shape: tuple[int, int], group: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    match kind:
        case "normal":
            return 2 * noise
        case "ties":
            return torch.randint(0, 3, shape, generator=generator).float()
        case "prior":
            return 10 * torch.randint(0, 2, shape, generator=generator) + noise
        case "gaps":
            return torch.tensor([0.0, 17, 100, 1000])[torch.randint(0, 4, shape, generator=generator)] + noise
        case _:
            return torch.tensor([float(kind)] + [0.0] * (group - 1)).repeat(shape[0], shape[1] // group)


def make(
    pattern, shape, kind="normal", seed=0, logits=torch.float32, weight=torch.bfloat16, programs=None, device="cpu"
):
    generator = torch.Generator().manual_seed(seed)
    values = make_logits(kind, shape, pattern[1], generator).to(logits)
    weights = torch.randn(shape, generator=generator).to(weight)
    return Layer(shape, values, torch.where(weights == 0, 1, weights), programs, device)
