"""Laws of MaskPro-plus: a mask for every window, engines that agree, a learner that resumes and never gets worse."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmbench.errors import NMBenchError, NumericalFailure
from nmbench.learn import CheckpointStore, LearnTask
from nmbench.options import build
from nmbench.pattern import Pattern
from nmbench.store import FileCheckpoints, MemoryCheckpoints
from nmbench_plugins.maskpro import MaskPro, MaskProPlus, twin
from nmbench_plugins.maskpro.engine import Engine
from nmbench_plugins.maskpro.logits import Drawn
from nmbench_plugins.maskpro.pair_engines import PairStreamedEngine, PairTorchEngine, choose_pair
from nmbench_plugins.maskpro.pair_logits import PairLogits
from nmbench_plugins.maskpro.pair_tracker import PairRule
from reference import policy as policy_reference
from reference.planted import FOUR_EIGHT, LENGTH, TWO_FOUR, VOCABULARY, cycles, equal, loss_of, make, planted

LEARNS = {"steps": 150, "prior": 1.0, "minibatch": 8, "check_every": 25, "checkpoint_every": 50}  # enough for the toy
RULE = PairRule(learning_rate=0.5, prior=2.0, fades_over=40)
quick = settings(max_examples=20, deadline=None)
ONE_FOUR, THREE_FOUR = Pattern(1, 4), Pattern(3, 4)
patterns = pytest.mark.parametrize(
    "pair", [(TWO_FOUR, TWO_FOUR), (FOUR_EIGHT, ONE_FOUR), (TWO_FOUR, THREE_FOUR)], ids=str
)


class TwinKernels:
    """The functions of `kernels` in torch; remembers the masks of every pair step by first group."""

    greedy = staticmethod(twin.greedy_reference)
    step = staticmethod(twin.step_reference)

    def __init__(self) -> None:
        self.drawn: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def pair_step(self, *tensors: Any, **options: Any) -> None:
        masks = twin.pair_step_reference(*tensors, **options)
        if masks.new is not None:
            self.drawn[int(options["step"]), options["first_group"]] = masks.new


@contextlib.contextmanager
def opened(kind: str, rule: PairRule = RULE, **options: Any) -> Iterator[Engine]:
    """An engine on the planted model."""
    task = make(**options)
    with torch.no_grad(), task.live_weights() as live:
        if kind == "torch":
            yield PairTorchEngine(task, live, rule)
        else:
            yield PairStreamedEngine(task, live, rule, TwinKernels())
    assert planted()[0].digest() == planted()[1].digest


engines = pytest.mark.parametrize("kind", ["torch", "streamed"])


def minibatch(step: int) -> Tensor:
    return cycles(64)[torch.arange(5 * step, 5 * step + 5) % 64]


def advance(engine: Engine, steps: int) -> None:
    start = engine.figures().step
    for step in range(start, start + steps):
        engine.advance(minibatch(step), torch.linspace(0, 1, 5))


def logits_of(engine: Engine) -> dict[str, Tensor]:
    """Logits by layer, [out, in]."""
    saved = engine.to_save()
    if engine.name == "streamed":
        return {name: saved[f"logits {name}"].clone() for name in engine.task.layers}
    flat = {p: logits.contiguous() for p, logits in engine.logits.flat.items()}
    return {n: logits.clone() for n, logits in engine.logits._drawn(flat).by_layer.items()}


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


# Learning


@quick
@given(st.integers(0, 2**31), st.sampled_from([TWO_FOUR, FOUR_EIGHT, ONE_FOUR]), st.booleans())
def test_no_steps_return_the_initial_mask(seed, pattern, select):
    """Without a step the initial mask comes back."""
    task = make(patterns=(pattern, pattern), seed=seed)
    assert equal(MaskProPlus(steps=0, select=select).learn(task), task.initial)
    assert task.notes["groups_changed"] == 0


@pytest.mark.parametrize("pair", [(TWO_FOUR, TWO_FOUR), (FOUR_EIGHT, TWO_FOUR)], ids=str)
def test_planted_problem_is_solved(pair):
    """From the worst mask, forward losses alone find weights that matter: strict masks, and notes of what happened."""
    task = make(patterns=pair)
    learnt = MaskProPlus(**LEARNS).learn(task)
    assert loss_of(task, learnt, cycles(16)) < loss_of(task, task.initial, cycles(16)) - 0.5
    for name, mask in learnt.items():
        assert (task.pattern[name].groups(mask).sum(-1) == task.pattern[name].keep).all()
    assert (task.notes["engine"], task.notes["steps"]) == ("torch (the device is cpu)", 150)
    assert task.notes["returned"] == "learnt"
    assert [entry["step"] for entry in task.notes["log"]] == list(range(25, 151, 25))
    assert planted()[0].digest() == planted()[1].digest


@quick
@given(st.integers(0, 16), st.integers(0, 2**31), st.sampled_from([1.0, 1000.0]))
def test_selected_mask_is_not_worse(unlike, seed, learning_rate):
    """Whatever the held-out windows and the step size, the mask returned is not worse on their unseen half."""
    selection = torch.cat([cycles(16)[unlike:], cycles(16, step=3)[:unlike]])
    selection = selection[torch.randperm(16, generator=torch.Generator().manual_seed(seed))]
    task = make(selection=selection, seed=seed)
    learnt = MaskProPlus(**{**LEARNS, "steps": 50}, learning_rate=learning_rate).learn(task)
    unseen = selection[8:]
    assert loss_of(task, learnt, unseen) <= loss_of(task, task.initial, unseen) + 0.005 + 1e-6


def test_cost_of_a_run():
    """Steps count twice; the check that windows come first costs three of 8 tokens."""
    task = make()
    MaskProPlus(steps=10, minibatch=4, check_every=5).learn(task)
    windows = 32 + 2 * 10 * 4 + 3 * 8 + 2 * 8  # reference, steps, looks, confirmation
    assert task.settle().forward_tokens == LENGTH * windows + 3 * 8
    assert task.settle().backward_tokens == 0


class Killed(Exception):
    """Stands for whatever ends a process."""


def run(store: CheckpointStore, method: MaskProPlus, kill_at: int | None, from_best: bool) -> tuple[dict, dict, dict]:
    """Run once; stop at event `kill_at`. Returns masks, cost and notes."""
    events = iter(range(10**6))

    def on_report(*event: Any) -> None:
        if next(events) == kill_at:
            raise Killed

    task = make(store=store, on_report=on_report, patterns=(TWO_FOUR, FOUR_EIGHT), from_best=from_best)
    return dict(method.learn(task)), asdict(task.settle()), task.notes


@quick
@given(st.lists(st.integers(0, 40), min_size=1, max_size=3), st.integers(1, 6), st.integers(1, 6), st.booleans())
@example([9, 25], 1, 4, True)
def test_killed_runs_resume(kills, check_every, checkpoint_every, drift):
    """A run killed at any moments and resumed, drifting or not, ends as an uninterrupted one: masks, cost and notes."""
    options = {"steps": 15, "minibatch": 4, "check_every": check_every, "checkpoint_every": checkpoint_every}
    method = MaskProPlus(**options, prior=1.0, learning_rate=1e4 if drift else 1.0)
    masks, cost, notes = run(MemoryCheckpoints(), method, None, drift)
    with tempfile.TemporaryDirectory() as folder:
        store = FileCheckpoints(Path(folder) / "acme.safetensors", "digest")
        starts = 1
        for kill_at in kills:
            with contextlib.suppress(Killed):
                run(store, method, kill_at, drift)
            starts += store.load() is not None
        resumed = run(store, method, None, drift)
    assert equal(resumed[0], masks)
    assert resumed[2] == notes
    checks = (starts - 1) * 3 * 8  # that windows come first, at every start
    assert resumed[1] == {**cost, "forward_tokens": resumed[1]["forward_tokens"]}
    assert cost["forward_tokens"] <= resumed[1]["forward_tokens"] <= cost["forward_tokens"] + checks


# Options


def test_maskpro_stays_the_papers():
    """The options that are not the paper's are those of MaskPro-plus alone, and the tracker is MaskPro's."""
    ours, papers = (set(asdict(method())) for method in (MaskProPlus, MaskPro))
    assert ours - papers == {"decay"}
    assert papers - ours == {"tracker", "normalise"}
    assert (MaskProPlus().init, MaskProPlus().minibatch, MaskProPlus().decay) == ("swaps", 32, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"minibatch": 1}, "option maskpro-plus.minibatch must be at least 2, not 1"), ({"prior": 0.0}, "maskpro-plus")],
)
def test_impossible_options(options, message):
    """Options without meaning are refused by name; one window cannot be compared."""
    with pytest.raises(NMBenchError, match=message):
        build(MaskProPlus, options, "acme")


def test_single_window_is_refused():
    """A pool of one window has nothing to compare."""
    with pytest.raises(NMBenchError, match="acme compares windows and needs 2 at least"):
        MaskProPlus().learn(make(pool=cycles(1)))


def test_broken_loss_stops(monkeypatch):
    """A loss that is not finite stops the learner, with the step named."""
    broken = torch.full((4,), torch.nan)
    monkeypatch.setattr(PairTorchEngine, "references", lambda self, tokens: broken)
    with pytest.raises(NumericalFailure, match="the loss of step 1 is nan"):
        MaskProPlus(steps=3, minibatch=4, select=False).learn(make())
