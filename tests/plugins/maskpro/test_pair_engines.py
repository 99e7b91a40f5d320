"""Laws of a pair step: every window has a mask of its own, and both engines take the steps of the formulas."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nmbench.errors import NMBenchError
from nmbench.learn import LearnTask
from nmbench.pattern import Pattern
from nmbench_plugins.maskpro import twin
from nmbench_plugins.maskpro.engine import Engine
from nmbench_plugins.maskpro.logits import Drawn
from nmbench_plugins.maskpro.pair_engines import PairStreamedEngine, PairTorchEngine, choose_pair
from nmbench_plugins.maskpro.pair_logits import PairLogits
from nmbench_plugins.maskpro.pair_tracker import PairRule
from reference import policy as policy_reference
from reference.planted import (
    FOUR_EIGHT,
    LENGTH,
    TWO_FOUR,
    VOCABULARY,
    cycles,
    equal,
    logits_of,
    loss_of,
    make,
    planted,
    working,
)

RULE = PairRule(learning_rate=0.5, prior=2.0, fades_over=40)
ONE_FOUR, THREE_FOUR = Pattern(1, 4), Pattern(3, 4)
patterns = pytest.mark.parametrize(
    "pair", [(TWO_FOUR, TWO_FOUR), (FOUR_EIGHT, ONE_FOUR), (TWO_FOUR, THREE_FOUR)], ids=str
)


class TwinKernels:
    """The functions of `kernels` in torch; remembers the masks of every pair step by first group."""

    greedy = staticmethod(twin.greedy_reference)

    def __init__(self) -> None:
        self.drawn: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def step(self, *tensors: Any, **options: Any) -> None:
        masks = twin.step_reference(*tensors, **options)
        if masks.new is not None:
            self.drawn[int(options["step"]), options["first_group"]] = masks.new


def opened(kind: str, rule: PairRule = RULE, **options: Any) -> AbstractContextManager[Engine]:
    """An engine on the planted model."""
    if kind == "torch":
        return working(lambda task, live: PairTorchEngine(task, live, rule), **options)
    return working(lambda task, live: PairStreamedEngine(task, live, rule, TwinKernels()), **options)


engines = pytest.mark.parametrize("kind", ["torch", "streamed"])


def minibatch(step: int) -> Tensor:
    return cycles(64)[torch.arange(5 * step, 5 * step + 5) % 64]


def advance(engine: Engine, steps: int) -> None:
    start = engine.figures().step
    for step in range(start, start + steps):
        engine.advance(minibatch(step), torch.linspace(0, 1, 5))


def remember_pairs(monkeypatch: Any) -> list[tuple[Drawn, Drawn]]:
    """A list that every pair drawn by `PairLogits` from now on is added to."""
    pairs: list[tuple[Drawn, Drawn]] = []
    draw = PairLogits.draw_pair

    def remembering(self: PairLogits, generator: torch.Generator) -> tuple[Drawn, Drawn]:
        pairs.append(draw(self, generator))
        return pairs[-1]

    monkeypatch.setattr(PairLogits, "draw_pair", remembering)
    return pairs


# A step


@patterns
def test_steps_are_those_of_the_formulas(monkeypatch, pair):
    """20 steps, each window under a mask put together row by row, follow the formulas in float64 with autograd."""
    pairs = remember_pairs(monkeypatch)
    with opened("torch", patterns=pair, seed=4) as engine:
        task, layers = engine.task, engine.task.layers
        groups = {n: task.pattern[n].group for n in layers}
        wanted = {n: RULE.prior * mask.double() for n, mask in task.initial.items()}
        for step in range(20):
            advance(engine, 1)
            a, b = (drawn.by_layer for drawn in pairs[step])
            coins = engine.tracker._coins
            losses = [mixed_loss(task, a, b, row, minibatch(step)[s : s + 1]) for s, row in enumerate(coins)]
            residuals = torch.tensor(losses).double() - torch.linspace(0, 1, 5).double()
            signal = (residuals - residuals.mean()) / residuals.std(correction=0) @ (2.0 * coins.double() - 1) / 5**0.5
            for name, rows in engine.tracker.rows.items():
                slope = slope_of(wanted[name], a[name], groups[name]) - slope_of(wanted[name], b[name], groups[name])
                wanted[name] = wanted[name] - 0.5 * (1 - step / 40) * signal[rows, None] * slope
        got = logits_of(engine)
    for name in layers:
        torch.testing.assert_close(got[name].double(), wanted[name], rtol=1e-3, atol=1e-3)
        assert (wanted[name] - RULE.prior * task.initial[name]).abs().max() > 0.1


def mixed_loss(
    task: LearnTask, a: Mapping[str, Tensor], b: Mapping[str, Tensor], coins: Tensor, window: Tensor
) -> float:
    """The loss of one window under the mask that takes every row from A or B as its coin says."""
    parts = dict(zip(task.layers, coins.split([rows for rows, _ in task.layers.values()]), strict=True))
    return loss_of(task, {n: torch.where(parts[n][:, None], a[n], b[n]) for n in task.layers}, window)


@torch.enable_grad()
def slope_of(logits: Tensor, mask: Tensor, group: int) -> Tensor:
    return policy_reference.grad_log_prob(logits.reshape(-1, group), mask.reshape(-1, group)).view(logits.shape)


@pytest.mark.parametrize("pair", [(TWO_FOUR, TWO_FOUR), (FOUR_EIGHT, ONE_FOUR)], ids=str)
def test_engines_agree(monkeypatch, pair):
    """Given the masks that the streamed engine drew, torch makes the same logits and scalars of them."""
    with opened("streamed", patterns=pair, seed=4) as engine:
        advance(engine, 12)
        wanted, figures, drawn = logits_of(engine), engine.figures(), engine.kernels.drawn
        places = engine.first_group

    def draw_pair(self: PairLogits, generator: torch.Generator) -> tuple[Drawn, Drawn]:
        steps = len(calls)
        calls.append(steps)
        return tuple(
            Drawn(self._flattened(masks), masks)
            for masks in ({n: drawn[steps, first][which] for n, first in places.items()} for which in (0, 1))
        )

    calls: list[int] = []
    monkeypatch.setattr(PairLogits, "draw_pair", draw_pair)
    with opened("torch", patterns=pair, seed=4) as engine:
        engine.logits.gradients.clear()  # of masks that it drew itself
        engine.logits.spare.clear()
        advance(engine, 12)
        for name, logits in logits_of(engine).items():
            torch.testing.assert_close(logits, wanted[name], rtol=1e-4, atol=1e-4)
            assert (logits - RULE.prior * engine.task.initial[name]).abs().max() > 0.1
        assert engine.figures()[:-1] == pytest.approx(figures[:-1], rel=1e-4)


@engines
def test_nothing_moves_where_both_masks_agree(monkeypatch, kind):
    """The logits of a group in which A and B keep the same stay, to the bit; others move unless all coins agree."""
    pairs = remember_pairs(monkeypatch)
    with opened(kind) as engine:
        for step in range(6):
            before = logits_of(engine)
            advance(engine, 1)
            for name, after in logits_of(engine).items():
                if kind == "torch":
                    a, b = (drawn.by_layer[name] for drawn in pairs[step])
                else:
                    a, b = engine.kernels.drawn[step, engine.first_group[name]]
                same = (a == b).view(-1, 4).all(1)
                moved = (after != before[name]).view(-1, 4).any(1)
                assert not moved[same].any()
                assert moved[~same].float().mean() > 0.6


@engines
def test_looking_changes_nothing(kind):
    """Whatever is asked of an engine between two steps, the logits afterwards are the same to the bit."""
    with opened(kind) as engine:
        advance(engine, 6)
        plain = logits_of(engine)
    with opened(kind) as engine:
        asked = [engine.greedy, lambda: engine.losses(cycles(2)), lambda: engine.losses(cycles(2), engine.task.initial)]
        asked += [lambda: engine.log_prob(engine.task.initial), engine.to_save, lambda: engine.references(cycles(2))]
        for look in asked:
            advance(engine, 1)
            look()
        assert equal(logits_of(engine), plain)


@engines
def test_broken_loss_is_seen_and_moves_nothing(kind):
    """The first step with a loss that is not finite is named, and neither it nor later ones move a logit."""
    with opened(kind) as engine:
        advance(engine, 2)
        before = logits_of(engine)
        engine.advance(minibatch(2), torch.tensor([0.0, torch.nan, 0, 0, 0]))
        engine.advance(minibatch(3), torch.zeros(5))
        assert engine.figures().broken == 3
        assert equal(logits_of(engine), before)


@engines
def test_forward_tokens_count_twice(kind):
    """A pair step computes two products per layer, so its tokens count twice."""
    with opened(kind) as engine:
        engine.advance(cycles(3), torch.zeros(3))
        assert engine.task.settle().forward_tokens == 2 * 3 * LENGTH


def test_flattened_tokens_are_refused(monkeypatch):
    """A model whose layers do not see whole windows cannot give each a mask of its own, and is refused by name."""
    model = planted()[0].model

    def forward(input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        hidden = F.one_hot(input_ids, VOCABULARY).float().flatten(0, 1)
        for block in model.blocks:
            hidden = block(hidden)
        return SimpleNamespace(logits=model.head(hidden).view(*input_ids.shape, VOCABULARY))

    monkeypatch.setattr(model, "forward", forward)
    task = make()
    message = (
        r"acme cannot give every window a mask of its own: layer blocks\.0 is given \[24, 16\] for \[3, 8\] tokens"
    )
    with task.live_weights() as live, pytest.raises(NMBenchError, match=message):
        choose_pair(task, live, RULE, "auto", "float32")
