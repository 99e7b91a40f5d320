"""How a step of MaskPro-plus is computed: every layer multiplies with two masks at once, a coin picks row by row.

A layer with masks A and B computes x [W_A; W_B]^T in one product with stacked weights `[2 * out, in]`; window s keeps
of output row o what its coin says. Everything else is what the engines of MaskPro do.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

import nmbench
from nmbench.evaluate import batch_size, losses_in_parts, window_losses
from nmbench.live import LiveWeights, masked
from nmbench_plugins.maskpro.engine import Engine, TorchEngine
from nmbench_plugins.maskpro.engines import choose
from nmbench_plugins.maskpro.logits import Drawn
from nmbench_plugins.maskpro.pair_logits import PairLogits
from nmbench_plugins.maskpro.pair_tracker import PairRule, PairTracker
from nmbench_plugins.maskpro.streamed import StreamedEngine

MASKS = 2  # A and B


class PairTorchEngine(TorchEngine):
    """Vectorised torch on any device and for every pattern; a pair step leaves the live weights alone."""

    logits_kind = PairLogits
    tracker: PairTracker
    logits: PairLogits

    def advance(self, tokens: Tensor, references: Tensor) -> None:
        self.task.count_forward(MASKS * tokens.numel())
        pair = self.logits.draw_pair(self.task.generator)
        coins = self.tracker.toss(len(tokens))
        self.tracker.take(self._mixed_losses(pair, coins, tokens), references)
        self.logits.step_pair(*pair, {name: self.tracker.scale[rows] for name, rows in self.tracker.rows.items()})

    def _mixed_losses(self, pair: tuple[Drawn, Drawn], coins: Tensor, tokens: Tensor) -> Tensor:
        """The loss of every window under its own mask, float32 `[windows]`."""

        def part(chosen: Tensor) -> Tensor:
            with self.live.computed(self._product(pair, coins[chosen])):
                return window_losses(self.task.model, tokens[chosen])

        numbers = torch.arange(len(tokens), device=tokens.device)
        return losses_in_parts(part, numbers, batch_size(self.task.model, tokens.shape[1]))

    def _product(self, pair: tuple[Drawn, Drawn], coins: Tensor) -> Callable[[str, Tensor], Tensor]:
        def product(name: str, input: Tensor) -> Tensor:
            dense = self.live.original(name)
            stacked = torch.empty(MASKS, *dense.shape, dtype=dense.dtype, device=dense.device)
            for drawn, out in zip(pair, stacked, strict=True):
                masked(dense, drawn.by_layer[name], out)
            return mix(input, stacked.flatten(0, 1), coins[:, self.tracker.rows[name]])

        return product


class PairStreamedEngine(StreamedEngine):
    """The streamed engine with two masks: neither masks nor gradients are stored, both masks come from their seed."""

    draws = MASKS
    tracker: PairTracker

    def _masked_layers(self, drawn: Callable[[str], Tensor], windows: int) -> AbstractContextManager[None]:
        coins, rows = self.tracker.toss(windows), self.tracker.rows
        return self.live.computed(lambda name, input: mix(input, drawn(name), coins[:, rows[name]]))

    def _scale(self, name: str) -> Tensor:
        return self.tracker.scale[self.tracker.rows[name]]


def mix(input: Tensor, stacked: Tensor, coins: Tensor) -> Tensor:
    """Row o of window s computed with A where the coin is True, else with B, without bias: `[windows, tokens, out]`.

    input `[windows, tokens, in]`; stacked `[2 * out, in]`, the weights masked by A above those masked by B; coins bool
    `[windows, out]`.
    """
    a, b = F.linear(input, stacked).chunk(MASKS, dim=-1)
    return torch.where(coins[:, None], a, b)


def choose_pair(task: nmbench.LearnTask, live: LiveWeights, rule: PairRule, engine: str, logits: str) -> Engine:
    """The pair engine to use, as `choose` does. Raises `NMBenchError` also where windows cannot have masks of their
    own.
    """
    check_windows(task, live)
    return choose(task, live, rule, engine, logits, (PairStreamedEngine, PairTorchEngine))


def check_windows(task: nmbench.LearnTask, live: LiveWeights) -> None:
    """Raise `NMBenchError` unless every layer is given `[windows, tokens, in]`."""
    tokens = task.pool[:1, :8].repeat(3, 1)

    def product(name: str, input: Tensor) -> Tensor:
        if input.shape[:-1] != tokens.shape:
            raise nmbench.NMBenchError(
                f"{task.who} cannot give every window a mask of its own: layer {name} is given {list(input.shape)} "
                f"for {list(tokens.shape)} tokens; use --method maskpro."
            )
        return F.linear(input, live[name])

    task.count_forward(tokens.numel())
    with live.computed(product):
        window_losses(task.model, tokens)
