"""A problem with a planted answer: a model that needs its large weights alone, solved in milliseconds.

Two linear layers of 16 inputs count up, token by token; every row has one weight that matters. A learner that starts
from the worst masks has much to gain, and forward losses show which weights matter.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmbench.models.bundle import Bundle
from nmbench.pattern import Pattern

__all__ = [
    "LENGTH",
    "VOCABULARY",
    "Planted",
    "cycles",
    "planted_bundle",
    "planted_loss",
    "planted_weights",
    "strongest",
    "weakest",
    "weighted_loss",
]

VOCABULARY = 16
LENGTH = 12


class Block(nn.Module):
    """One linear layer, with a count of the tokens of its inputs."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.tokens_seen = 0
        self.linear = nn.Linear(VOCABULARY, VOCABULARY, bias=False)
        self.linear.weight = nn.Parameter(weight)

    def forward(self, hidden: Tensor) -> Tensor:
        self.tokens_seen += hidden.shape[:-1].numel()
        return self.linear(hidden)


class Planted(nn.Module):
    """A model that predicts the next token of a cycle by two linear layers and needs its large weights alone."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        noise = [0.1 * torch.randn(VOCABULARY, VOCABULARY, generator=generator) for _ in range(2)]
        planted = [2.5 * torch.eye(VOCABULARY).roll(shift, 0) for shift in (1, 0)]
        self.blocks = nn.ModuleList([Block(n + p) for n, p in zip(noise, planted, strict=True)])
        self.head = nn.Linear(VOCABULARY, VOCABULARY, bias=False)
        self.head.weight = nn.Parameter(torch.eye(VOCABULARY))

    @property
    def tokens_seen(self) -> int:
        """The number of tokens that went through the model; a token that went through one of two blocks counts half."""
        return sum(block.tokens_seen for block in self.blocks if isinstance(block, Block)) // len(self.blocks)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        hidden = F.one_hot(input_ids, VOCABULARY).to(self.head.weight.dtype)
        for block in self.blocks:
            hidden = block(hidden)
        return SimpleNamespace(logits=self.head(hidden))


def planted_bundle() -> Bundle:
    """A fresh `Planted` model with its two prunable layers `[16, 16]`; no tokenizer."""
    with torch.random.fork_rng(devices=[]):
        return Bundle.of("planted", Planted(), None)


@functools.cache
def planted_weights() -> Mapping[str, Tensor]:
    """The dense weights of every planted model: layer name -> `[16, 16]`; all calls share them, so only to be read."""
    return MappingProxyType({name: layer.read().clone() for name, layer in planted_bundle().layers.items()})


def cycles(count: int, step: int = 1, length: int = LENGTH) -> Tensor:
    """Windows int64 `[count, length]` that count up by `step`, from every start in turn; the model predicts step 1."""
    return (torch.arange(count)[:, None] + step * torch.arange(length)) % VOCABULARY


def weakest(bundle: Bundle, patterns: Mapping[str, Pattern]) -> dict[str, Tensor]:
    """The worst masks, which keep the smallest weights of every group: layer name -> bool `[out, in]`."""
    return {name: patterns[name].top(-layer.read().abs()) for name, layer in bundle.layers.items()}


def strongest(bundle: Bundle, patterns: Mapping[str, Pattern]) -> dict[str, Tensor]:
    """The best masks, which keep the largest weights of every group: layer name -> bool `[out, in]`."""
    return {name: patterns[name].top(layer.read().abs()) for name, layer in bundle.layers.items()}


def planted_loss(masks: Mapping[str, Tensor], windows: Tensor | None = None) -> float:
    """Mean cross-entropy in nats of the planted model under `masks`, computed in float64 without the model's own code.

    `windows` are all cycles by default.
    """
    return weighted_loss({name: weight.double() * masks[name] for name, weight in planted_weights().items()}, windows)


def weighted_loss(weights: Mapping[str, Tensor], windows: Tensor | None = None) -> float:
    """Mean cross-entropy in nats of the planted model with other `weights` `[16, 16]`, as `planted_loss`."""
    windows = cycles(VOCABULARY) if windows is None else windows
    hidden = F.one_hot(windows, VOCABULARY).double()
    for name in planted_weights():
        hidden = hidden @ weights[name].detach().cpu().double().t()
    return float(F.cross_entropy(hidden[:, :-1].reshape(-1, VOCABULARY), windows[:, 1:].reshape(-1)))
