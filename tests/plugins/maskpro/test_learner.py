"""Laws of the MaskPro learner (arXiv 2506.12876): its update, its resumption, and the guard against worse masks."""

import functools
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nmbench.errors import NMBenchError, NumericalFailure
from nmbench.learn import CheckpointStore, LearnTask
from nmbench.models import Bundle, DenseWeights
from nmbench.options import build
from nmbench.pattern import Pattern
from nmbench.store import FileCheckpoints, MemoryCheckpoints
from nmbench_plugins.maskpro import MaskPro, policy
from nmbench_plugins.tiny import TinyModel
from reference import policy as reference

VOCABULARY = 16
LENGTH = 12
TWO_FOUR, FOUR_EIGHT = Pattern(2, 4), Pattern(4, 8)
LEARNS = {"steps": 150, "prior": 1.0, "minibatch": 4, "check_every": 25, "checkpoint_every": 50}  # enough for the toy
quick = settings(max_examples=20, deadline=None)


class Planted(nn.Module):
    """Predicts the next token of a cycle through two linear layers; its large weights are all that it needs."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(VOCABULARY, VOCABULARY, bias=False) for _ in range(2)])
        self.head = nn.Linear(VOCABULARY, VOCABULARY, bias=False)
        self.head.weight = nn.Parameter(torch.eye(VOCABULARY))
        for block, shift in zip(self.blocks, (1, 0), strict=True):
            noise = 0.1 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
            block.weight = nn.Parameter(noise + 2.5 * torch.eye(VOCABULARY).roll(shift, 0))

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        hidden = F.one_hot(input_ids, VOCABULARY).to(self.head.weight.dtype)
        for block in self.blocks:
            hidden = block(hidden)
        return SimpleNamespace(logits=self.head(hidden))


@functools.cache
def planted() -> tuple[Bundle, DenseWeights]:
    bundle = Bundle.of("planted", Planted(), None)
    return bundle, DenseWeights(bundle)


def cycles(count: int, step: int = 1, length: int = LENGTH) -> Tensor:
    """Windows that count up by `step`, from every start in turn; the model knows step 1 only."""
    return (torch.arange(count)[:, None] + step * torch.arange(length)) % VOCABULARY


def weakest(bundle: Bundle, patterns: Mapping[str, Pattern]) -> dict[str, Tensor]:
    """The worst masks: the smallest weights of every group are kept."""
    return {name: patterns[name].top(-layer.read().abs()) for name, layer in bundle.layers.items()}


def make(
    pool: Tensor | None = None,
    selection: Tensor | None = None,
    store: CheckpointStore | None = None,
    patterns: tuple[Pattern, Pattern] = (TWO_FOUR, TWO_FOUR),
    seed: int = 0,
    on_report: Any = lambda *event: None,
) -> LearnTask:
    """A learning task on the planted model, from the worst masks."""
    bundle, dense = planted()
    by_layer = dict(zip(bundle.layers, patterns, strict=True))
    pool = cycles(32) if pool is None else pool
    selection = cycles(16) if selection is None else selection
    store = store or MemoryCheckpoints()
    initial = weakest(bundle, by_layer)
    return LearnTask(bundle, dense, by_layer, initial, pool, selection, seed, store, "acme", on_report)


def loss_of(task: LearnTask, masks: Mapping[str, Tensor], windows: Tensor) -> float:
    """Mean cross-entropy of the planted model under `masks`, float64, written out."""
    hidden = F.one_hot(windows, VOCABULARY).double()
    for name in task.layers:
        hidden = hidden @ (task.dense[name].double() * masks[name]).t()
    return float(F.cross_entropy(hidden[:, :-1].reshape(-1, VOCABULARY), windows[:, 1:].reshape(-1)))


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The update


@pytest.mark.parametrize("patterns", [(TWO_FOUR, TWO_FOUR), (FOUR_EIGHT, FOUR_EIGHT), (TWO_FOUR, FOUR_EIGHT)])
def test_steps_are_the_papers(patterns):
    """Without normalising, shuffling and selecting, logits follow the published update with an exact gradient."""
    method = MaskPro(steps=5, learning_rate=3.0, prior=2.0, minibatch=3, shuffle=False, normalise=False, select=False)
    store = MemoryCheckpoints()
    learnt = method.learn(make(store=store, patterns=patterns, seed=4))
    task, generator, delta = make(patterns=patterns), torch.Generator().manual_seed(4), 0.0
    distinct = list(dict.fromkeys(patterns))
    groups = {p: [n for n in task.layers if task.pattern[n] == p] for p in distinct}
    logits = {p: torch.cat([2.0 * task.initial[n].view(-1, p.group) for n in groups[p]]).double() for p in distinct}
    for step in range(5):
        windows = task.pool[torch.arange(3 * step, 3 * step + 3) % len(task.pool)]
        drawn = {p: policy.sample(logits[p].float(), p.keep, generator) for p in distinct}
        masks = {}
        for p in distinct:
            parts = drawn[p].split([task.dense[n].numel() // p.group for n in groups[p]])
            masks |= {n: part.reshape(task.layers[n]) for n, part in zip(groups[p], parts, strict=True)}
        residual = loss_of(task, masks, windows) - loss_of(task, task.initial, windows)
        delta = 0.99 * delta + 0.01 * residual
        for p in distinct:
            logits[p] -= 3.0 * (residual - delta) * reference.grad_log_prob(logits[p], drawn[p])
    saved = store.load()
    for p in distinct:
        torch.testing.assert_close(saved[f"logits {p}"].double(), logits[p], rtol=1e-4, atol=1e-4)
        assert (logits[p] - logits[p].round()).abs().max() > 0.01  # something was learnt
    assert saved["baseline"] == pytest.approx(delta, abs=1e-5)
    assert all((task.pattern[name].kept(mask) == task.pattern[name].keep).all() for name, mask in learnt.items())


@quick
@given(st.integers(0, 2**31), st.sampled_from([TWO_FOUR, FOUR_EIGHT, Pattern(1, 4)]), st.booleans())
def test_no_steps_return_the_initial_mask(seed, pattern, select):
    """Without a step the initial mask comes back, and the record says that no group changed."""
    task = make(patterns=(pattern, pattern), seed=seed)
    assert equal(MaskPro(steps=0, select=select).learn(task), task.initial)
    assert task.notes["groups_changed"] == 0
    assert task.settle().unique_tokens == 0


@pytest.mark.parametrize("normalise", [True, False])
def test_constant_losses_move_nothing(normalise):
    """Where no mask makes a difference to the loss, no logit moves, however the advantage is scaled."""
    bundle = TinyModel().load("llama")
    bundle.model.get_output_embeddings().weight.zero_()
    patterns, store = dict.fromkeys(bundle.layers, TWO_FOUR), MemoryCheckpoints()
    initial, tokens = weakest(bundle, patterns), torch.arange(64).view(8, 8)
    task = LearnTask(bundle, DenseWeights(bundle), patterns, initial, tokens, tokens, 0, store, "acme")
    learnt = MaskPro(steps=4, prior=1.5, learning_rate=100.0, normalise=normalise, select=False).learn(task)
    assert equal(learnt, initial)
    assert store.load()["logits 2:4"].unique().tolist() == [0.0, 1.5]
    assert (task.notes["baseline"], task.notes["log"][-1]["spread"]) == (0, 0)


def test_normalised_steps_do_not_depend_on_the_scale_of_the_loss():
    """With `normalise`, the first advantage is the sign of the first residual, whatever its size."""
    for residual in (1e-3, -7.0):
        state = SimpleNamespace(step=0, baseline=0.0, mean_square=0.0)
        advantage = state_advantage(state, residual, MaskPro())
        assert advantage == pytest.approx(1 if residual > 0 else -1)
        assert state.baseline == pytest.approx(0.01 * residual)


def state_advantage(state: SimpleNamespace, residual: float, method: MaskPro) -> float:
    from nmbench_plugins.maskpro.learner import State

    return State.advantage(state, residual, method, "acme")


# Learning


def test_planted_problem_is_solved():
    """From the worst mask, forward losses alone find weights that matter; the dense weights stay as they are."""
    task = make()
    learnt = MaskPro(**LEARNS).learn(task)
    windows = cycles(16)
    before, after = loss_of(task, task.initial, windows), loss_of(task, learnt, windows)
    assert before > 2
    assert after < before - 0.5
    assert task.notes["returned"] == "learnt"
    assert 0 < task.notes["groups_changed"] < 1
    assert planted()[0].digest() == planted()[1].digest


@quick
@given(st.integers(0, 16), st.integers(0, 2**31), st.booleans())
def test_selected_mask_is_never_worse(unlike, seed, shuffle):
    """Whatever the held-out windows, the mask returned is not worse on their unseen half than the initial one."""
    likes, unlikes = cycles(16)[unlike:], cycles(16, step=3)[:unlike]
    selection = torch.cat([likes, unlikes])[torch.randperm(16, generator=torch.Generator().manual_seed(seed))]
    task = make(selection=selection, seed=seed)
    learnt = MaskPro(**{**LEARNS, "steps": 50}, shuffle=shuffle).learn(task)
    unseen = selection[8:]
    assert loss_of(task, learnt, unseen) <= loss_of(task, task.initial, unseen) + 1e-6
    assert equal(learnt, task.initial) == (task.notes["returned"] == "initial")


def test_unconfirmed_mask_is_not_returned():
    """A mask that is better on the windows looked at and worse on the unseen ones gives way to the initial one."""
    task = make(selection=torch.cat([cycles(8), cycles(8, step=3)]))
    learnt = MaskPro(**LEARNS).learn(task)
    assert task.notes["best_step"] > 0
    assert task.notes["log"][-1]["held_out"] < loss_of(task, task.initial, cycles(8))
    assert task.notes["confirmation"]["one_sided_95_bound"] > 0
    assert task.notes["returned"] == "initial"
    assert equal(learnt, task.initial)


def test_without_select_the_held_out_windows_are_not_read():
    """A learner that does not select reads no held-out window, and returns what it learnt."""
    task = make(selection=cycles(2, step=3))
    learnt = MaskPro(**LEARNS, select=False).learn(task)
    assert task.settle().selection_tokens == 0
    assert "returned" not in task.notes
    assert loss_of(task, learnt, cycles(16)) < loss_of(task, task.initial, cycles(16)) - 0.5


def test_cost_of_a_run():
    """Forward tokens are those of the reference, the steps, the looks and the confirmation; nothing goes backward."""
    task = make()
    MaskPro(steps=10, minibatch=4, check_every=5).learn(task)
    reference_, steps, looks, confirmation = 32, 10 * 4, 3 * 8, 2 * 8  # windows
    assert task.settle().forward_tokens == LENGTH * (reference_ + steps + looks + confirmation)
    assert task.settle().backward_tokens == 0
    assert task.settle().selection_tokens == 16 * LENGTH


@pytest.mark.parametrize(("pool_windows", "steps", "unique"), [(5, 9, 5), (None, 3, 12), (None, 50, 32)])
def test_unique_tokens(pool_windows, steps, unique):
    """In fixed order, each window dealt counts once, and none outside `pool_windows`."""
    task = make()
    MaskPro(steps=steps, minibatch=4, shuffle=False, select=False, pool_windows=pool_windows).learn(task)
    assert task.settle().unique_tokens == unique * LENGTH


# Killed and resumed


class Killed(Exception):
    """Stands for whatever ends a process."""


def run(store: CheckpointStore, method: MaskPro, kill_at: int | None) -> tuple[dict, dict, dict, int]:
    """Run once; stop at event `kill_at`. Returns masks, cost, notes and the number of events."""
    events = 0

    def on_report(*event: Any) -> None:
        nonlocal events
        if events == kill_at:
            raise Killed
        events += 1

    task = make(store=store, on_report=on_report, patterns=(TWO_FOUR, FOUR_EIGHT))
    masks = dict(method.learn(task))
    return masks, asdict(task.settle()), task.notes, events


@quick
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=3),
    st.integers(1, 6),
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
)
def test_killed_runs_resume(kills, check_every, checkpoint_every, shuffle, select):
    """A run killed at any moments and resumed ends with the masks, the cost and the notes of an uninterrupted one."""
    method = MaskPro(
        steps=15,
        prior=1.0,
        minibatch=4,
        check_every=check_every,
        checkpoint_every=checkpoint_every,
        shuffle=shuffle,
        select=select,
    )
    masks, cost, notes, events = run(MemoryCheckpoints(), method, None)
    with tempfile.TemporaryDirectory() as folder:
        store = FileCheckpoints(Path(folder) / "acme.safetensors", "digest")
        for kill_at in kills:
            try:
                assert run(store, method, kill_at)[3] <= kill_at
            except Killed:
                assert planted()[0].digest() == planted()[1].digest
        resumed = run(store, method, None)
    assert equal(resumed[0], masks)
    assert resumed[1:3] == (cost, notes)
    assert events >= 15


def test_resumed_run_takes_the_steps_that_are_left():
    """A run killed after step 12 with a checkpoint at 10 goes on at step 11."""
    store, told = MemoryCheckpoints(), []
    method = MaskPro(steps=15, minibatch=4, select=False, checkpoint_every=10)
    with pytest.raises(Killed):
        run(store, method, 8 + 12)  # the reference takes 8 events
    task = make(store=store, patterns=(TWO_FOUR, FOUR_EIGHT), on_report=lambda *event: told.append(event[:2]))
    method.learn(task)
    assert told[8:] == [("learn", step) for step in range(11, 16)]


# Options


def test_preset_paper():
    """The preset `paper` is the published setting: 10,000 steps of 32 x 128 tokens over 512 windows in fixed order."""
    method = build(MaskPro, {"preset": "paper"}, "acme")
    assert (method.steps, method.learning_rate, method.prior) == (10_000, 50, 10)
    assert (method.minibatch, method.window_tokens, method.pool_windows) == (32, 128, 512)
    assert (method.shuffle, method.normalise, method.select, method.tracker) == (False, False, False, 0.99)


def test_explicit_options_beat_the_preset():
    """What is given explicitly counts, in whatever order, and the rest of the preset stays."""
    method = build(MaskPro, {"steps": "7", "preset": "paper", "select": "true"}, "acme")
    assert (method.steps, method.select, method.learning_rate) == (7, True, 50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "maskpro.steps"),
        ({"minibatch": 0}, "maskpro.minibatch"),
        ({"check_every": 0}, "maskpro.check_every"),
        ({"checkpoint_every": 0}, "maskpro.checkpoint_every"),
        ({"tracker": 1.0}, r"maskpro.tracker must lie in \[0, 1\)"),
        ({"tracker": -0.1}, "maskpro.tracker"),
    ],
)
def test_impossible_options(options, message):
    """Options without meaning are refused by name."""
    with pytest.raises(NMBenchError, match=message):
        MaskPro(**options)


# What is refused


def test_small_pool():
    """A pool with fewer windows than asked for is refused with what to do about it."""
    with pytest.raises(NMBenchError, match=r"33 windows of 12 tokens, the pool has 32; raise --pool-tokens to 396"):
        MaskPro(pool_windows=33).learn(make())


def test_short_windows():
    """A pool of shorter windows than asked for is refused."""
    with pytest.raises(NMBenchError, match="asks for windows of 128 tokens, the pool has 12; raise --window-tokens"):
        build(MaskPro, {"preset": "paper"}, "acme").learn(make())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_small_selection(count):
    """Fewer than four held-out windows are too few to choose and to confirm by."""
    with pytest.raises(NMBenchError, match="needs at least 4 selection windows; raise --selection-tokens"):
        MaskPro(steps=1).learn(make(selection=cycles(count)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_loss_stops(value):
    """A loss that is not finite stops the learner at that step; the dense weights are back and no mask is returned."""
    bundle = Bundle.of("broken", Planted(), None)
    bundle.model.head.weight[3, 3] = value
    dense, patterns = DenseWeights(bundle), dict.fromkeys(bundle.layers, TWO_FOUR)
    initial = weakest(bundle, patterns)
    task = LearnTask(bundle, dense, patterns, initial, cycles(8), cycles(8), 0, MemoryCheckpoints(), "acme")
    with pytest.raises(NumericalFailure, match="acme: the loss of step 1 is nan"):
        MaskPro(steps=3, select=False).learn(task)
    assert bundle.digest() == dense.digest
