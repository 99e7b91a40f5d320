"""Laws of the MaskPro learner (arXiv 2506.12876): its update, its resumption, and the guard against worse masks."""

import tempfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmbench.errors import NMBenchError, NumericalFailure
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.options import build
from nmbench.pattern import Pattern
from nmbench.pruning.learning import CheckpointStore, LearnTask
from nmbench.results.files import FileCheckpoints, MemoryCheckpoints
from nmbench_plugins.maskpro import MaskPro, training
from nmbench_plugins.maskpro.tracker import Rule, Tracker
from nmbench_plugins.tiny import TinyModel
from reference import maskpro as reference
from reference.planted import (
    FOUR_EIGHT,
    LENGTH,
    TWO_FOUR,
    Planted,
    cycles,
    equal,
    loss_of,
    make,
    planted,
    record_draws,
    weakest,
)

LEARNS = {"steps": 150, "prior": 1.0, "minibatch": 4, "check_every": 25, "checkpoint_every": 50}  # enough for the toy
quick = settings(max_examples=20, deadline=None)


# The update


@pytest.mark.parametrize("patterns", [(TWO_FOUR, TWO_FOUR), (FOUR_EIGHT, FOUR_EIGHT), (TWO_FOUR, FOUR_EIGHT)])
@pytest.mark.parametrize("options", [{"learning_rate": "3", "prior": "2"}, {}])
def test_preset_paper_takes_the_papers_steps(monkeypatch, patterns, options):
    """50 steps of the preset are the published ones, minibatch after minibatch, computed from the formulas alone."""
    small = {"steps": "50", "window_tokens": str(LENGTH), "pool_windows": "30", "minibatch": "4"}
    method = build(MaskPro, {"preset": "paper", **small, **options}, "acme")
    draws, store = record_draws(monkeypatch), MemoryCheckpoints()
    task = make(store=store, patterns=patterns, seed=4)
    learnt = method.learn(task)

    def loss(step: int, masks: dict) -> float:
        windows = task.pool[torch.arange(4 * step, 4 * step + 4) % 30]
        return loss_of(task, {name: mask.view(task.layers[name]) for name, mask in masks.items()}, windows)

    def grouped(masks: dict) -> dict:
        return {name: mask.reshape(-1, task.pattern[name].group) for name, mask in masks.items()}

    masks = [grouped(drawn) for drawn in draws]
    logits, delta = reference.learn(grouped(task.initial), masks, loss, method.learning_rate, method.prior)
    saved = store.load()
    for pattern in set(patterns):
        wanted = torch.cat([logits[name] for name in task.layers if task.pattern[name] == pattern])
        torch.testing.assert_close(saved[f"logits {pattern}"].double(), wanted, rtol=1e-3, atol=1e-3)
        assert not options or not torch.equal(wanted, wanted.round())  # something was learnt
    assert saved["baseline"] == pytest.approx(delta, abs=1e-5)
    assert equal(learnt, {n: task.pattern[n].top(logits[n].view(task.layers[n])) for n in task.layers})


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
        tracker = Tracker(Rule(learning_rate=2.0, prior=1.0, decay=0.99, normalise=True), torch.device("cpu"))
        tracker.take(torch.full((3,), 1.0 + residual), torch.ones(3))
        assert float(tracker.scale) == pytest.approx(-2 if residual > 0 else 2)
        assert tracker.figures().baseline == pytest.approx(0.01 * residual, rel=1e-3)


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
@given(st.integers(0, 16), st.integers(0, 2**31), st.booleans(), st.sampled_from([1.0, 1000.0]))
def test_selected_mask_is_not_worse(unlike, seed, shuffle, learning_rate):
    """Whatever the held-out windows and the step size, the mask returned is not worse on their unseen half."""
    likes, unlikes = cycles(16)[unlike:], cycles(16, step=3)[:unlike]
    selection = torch.cat([likes, unlikes])[torch.randperm(16, generator=torch.Generator().manual_seed(seed))]
    task = make(selection=selection, seed=seed)
    learnt = MaskPro(**{**LEARNS, "steps": 50}, shuffle=shuffle, learning_rate=learning_rate).learn(task)
    unseen = selection[8:]
    assert loss_of(task, learnt, unseen) <= loss_of(task, task.initial, unseen) + 0.005 + 1e-6
    assert equal(learnt, task.initial) == (task.notes["returned"] == "initial")


def test_unconfirmed_mask_is_not_returned():
    """A mask that is better on the windows looked at and worse on the unseen ones gives way to the initial one."""
    task = make(selection=torch.cat([cycles(8), cycles(8, step=3)]))
    learnt = MaskPro(**LEARNS).learn(task)
    assert task.notes["best_step"] > 0
    assert task.notes["log"][-1]["held_out"] < loss_of(task, task.initial, cycles(8))
    assert task.notes["confirmation"]["one_sided_95_bound"] > 0.005
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
    """Forward tokens are those of the reference, the steps, the looks and, where the best mask is not the initial one,
    the confirmation; nothing goes backward.
    """
    task = make()
    MaskPro(steps=10, minibatch=4, check_every=5).learn(task)
    reference_, steps, looks = 32, 10 * 4, 3 * 8  # windows
    confirmation = 2 * 8 if task.notes["best_step"] else 0
    assert task.settle().forward_tokens == LENGTH * (reference_ + steps + looks + confirmation)
    assert task.settle().backward_tokens == 0
    assert task.settle().selection_tokens == 16 * LENGTH


@pytest.mark.parametrize(("pool_windows", "steps", "unique"), [(5, 9, 5), (None, 3, 12), (None, 50, 32)])
def test_unique_tokens(pool_windows, steps, unique):
    """In fixed order, each window dealt counts once, and none outside `pool_windows`."""
    task = make()
    MaskPro(steps=steps, minibatch=4, shuffle=False, select=False, pool_windows=pool_windows).learn(task)
    assert task.settle().unique_tokens == unique * LENGTH


def test_record_says_what_happened():
    """The notes hold engine, steps, best step, share of groups changed, held-out curve, drifts and confirmation."""
    task = make()
    MaskPro(**LEARNS).learn(task)
    notes = task.notes
    assert (notes["engine"], notes["steps"]) == ("torch (the device is cpu)", 150)
    assert [entry["step"] for entry in notes["log"]] == list(range(25, 151, 25))
    assert notes["best_step"] in [entry["step"] for entry in notes["log"]]
    assert min(entry["held_out"] for entry in notes["log"]) == notes["log"][notes["best_step"] // 25 - 1]["held_out"]
    assert notes["drifts"] == []
    assert notes["confirmation"]["one_sided_95_bound"] <= 0.005


def test_drifting_learner_gives_up():
    """A step size that is far too large is halved time and again, and then learning ends before all steps are taken."""
    task = make(from_best=True)
    MaskPro(**{**LEARNS, "steps": 500, "check_every": 2}, learning_rate=1e6).learn(task)
    drifts = task.notes["drifts"]
    assert [drift["learning_rate"] for drift in drifts] == [1e6 / 2**k for k in range(1, len(drifts) + 1)]
    assert task.notes["steps"] == drifts[-1]["step"] < 500
    assert [e["learning_rate"] for e in task.notes["log"]][-1] == drifts[-2]["learning_rate"]


def test_preset_long_is_the_default_with_other_numbers():
    """It takes more and smaller steps; nothing of the algorithm is switched on or off."""
    default, long = asdict(MaskPro()), asdict(build(MaskPro, {"preset": "long"}, "acme"))
    changed = {name for name in default if default[name] != long[name]}
    assert changed == {"steps", "learning_rate", "prior", "minibatch", "tracker", "check_every"}
    assert long["steps"] > default["steps"] and long["learning_rate"] < default["learning_rate"]


def test_preset_paper_knows_no_watch():
    """The published algorithm takes all its steps and returns what it learnt, however it drifts."""
    task = make(selection=cycles(0))
    options = {"steps": "60", "window_tokens": str(LENGTH), "pool_windows": "32", "learning_rate": "1e6"}
    build(MaskPro, {"preset": "paper", **options}, "acme").learn(task)
    assert task.notes["steps"] == 60
    assert not {"drifts", "returned", "confirmation"} & task.notes.keys()


# Killed and resumed


class Killed(Exception):
    """Stands for whatever ends a process."""


def run(
    store: CheckpointStore, method: MaskPro, kill_at: int | None, from_best: bool = False
) -> tuple[dict, dict, dict, int]:
    """Run once; stop at event `kill_at`. Returns masks, cost, notes and the number of events."""
    events = 0

    def on_report(*event: Any) -> None:
        nonlocal events
        if events == kill_at:
            raise Killed
        events += 1

    task = make(store=store, on_report=on_report, patterns=(TWO_FOUR, FOUR_EIGHT), from_best=from_best)
    masks = dict(method.learn(task))
    return masks, asdict(task.settle()), task.notes, events


@quick
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=3),
    st.integers(1, 6),
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
@example([9, 25], 1, 4, True, True, True)
def test_killed_runs_resume(kills, check_every, checkpoint_every, shuffle, select, drift):
    """A run killed at any moments and resumed, drifting or not, ends with the masks, the cost and the notes of an
    uninterrupted one.
    """
    method = MaskPro(
        steps=15,
        learning_rate=1e4 if drift else 1.0,
        prior=1.0,
        minibatch=4,
        check_every=check_every,
        checkpoint_every=checkpoint_every,
        shuffle=shuffle,
        select=select,
    )
    masks, cost, notes, events = run(MemoryCheckpoints(), method, None, drift)
    with tempfile.TemporaryDirectory() as folder:
        store = FileCheckpoints(Path(folder) / "acme.safetensors", "digest")
        for kill_at in kills:
            try:
                assert run(store, method, kill_at, drift)[3] <= kill_at
            except Killed:
                assert planted()[0].digest() == planted()[1].digest
        resumed = run(store, method, None, drift)
    assert equal(resumed[0], masks)
    assert resumed[1:3] == (cost, notes)
    assert events >= notes["steps"]
    assert not (drift and select and check_every < 5) or notes["drifts"]


def test_resumed_run_takes_the_steps_that_are_left():
    """A run killed after step 12 with a checkpoint at 10 goes on at step 11."""
    store, told = MemoryCheckpoints(), []
    method = MaskPro(steps=15, minibatch=4, select=False, checkpoint_every=10)
    with pytest.raises(Killed):
        run(store, method, 8 + 12)  # the reference takes 8 events, and is in the checkpoint
    task = make(store=store, patterns=(TWO_FOUR, FOUR_EIGHT), on_report=lambda *event: told.append(event[:2]))
    method.learn(task)
    assert told == [("learn", step) for step in range(11, 16)]


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


class Infected(Planted):
    """Gives NaN or infinite logits for every window that holds one token."""

    def __init__(self, value: float, token: int) -> None:
        super().__init__()
        self.value, self.token = value, token

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        logits = super().forward(input_ids).logits
        return SimpleNamespace(logits=logits.masked_fill((input_ids == self.token).any(1)[:, None, None], self.value))


def broken(value: float, pool: Tensor, store: CheckpointStore) -> LearnTask:
    """A task whose model breaks down on token 15."""
    bundle = Bundle.of("broken", Infected(value, 15), None)
    patterns = dict.fromkeys(bundle.layers, TWO_FOUR)
    selection = cycles(8, length=4)
    return LearnTask(
        bundle, DenseWeights(bundle), patterns, weakest(bundle, patterns), pool, selection, 0, store, "acme"
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_loss_stops(value):
    """A loss that is not finite stops the learner: step, windows and what is kept are named, the weights are dense."""
    task = broken(value, torch.cat([cycles(9, length=6), cycles(12, length=6)[9:]]), MemoryCheckpoints())
    method = MaskPro(steps=9, minibatch=3, select=False, shuffle=False, checkpoint_every=2)
    with pytest.raises(NumericalFailure) as caught:
        method.learn(task)
    assert str(caught.value).startswith(
        "acme: the loss of step 4 is nan (minibatch: windows 9, 10, 11); the checkpoint of step 2 is kept."
    )
    assert task.checkpoints.load()["step"] == 2
    assert task.bundle.digest() == task._weights.digest


def test_broken_loss_before_any_checkpoint():
    """Where nothing was saved yet, the message says so."""
    task = broken(torch.nan, cycles(3, step=15), MemoryCheckpoints())
    with pytest.raises(NumericalFailure, match=r"the loss of step 1 is nan .* there is no checkpoint yet"):
        MaskPro(steps=3, select=False).learn(task)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory(monkeypatch, error):
    """Running out of memory is one line that says what to lower, with the label to say it with."""
    task = make()

    def loss(tokens):
        raise error

    monkeypatch.setattr(task, "loss", loss)
    with pytest.raises(NMBenchError, match=r"acme ran out of memory .*lower --set acme\.minibatch") as caught:
        MaskPro(steps=3).learn(task)
    assert "\n" not in str(caught.value)
    assert task.bundle.digest() == planted()[1].digest


def test_other_errors_pass(monkeypatch):
    """Other errors keep their name."""
    task = make()
    monkeypatch.setattr(task, "loss", lambda tokens: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        MaskPro(steps=3).learn(task)


# Checkpoints


def saves(monkeypatch, method: MaskPro, seconds_per_step: float, seconds_per_save: float) -> list[int]:
    """The steps at which a run saves, with a clock of our own."""
    now, steps = 0.0, []

    class Slow(MemoryCheckpoints):
        def save(self, state):
            nonlocal now
            now += seconds_per_save
            steps.append(state["step"])
            super().save(state)

    def on_report(stage, done, total, values):
        nonlocal now
        now += seconds_per_step if stage == "learn" else 0.0

    monkeypatch.setattr(training.time, "perf_counter", lambda: now)
    method.learn(make(store=Slow(), on_report=on_report))
    return steps


@pytest.mark.parametrize(
    ("seconds_per_step", "seconds_per_save", "wanted"),
    [
        (0.01, 0.0, [10, 20, 30]),
        (100.0, 0.0, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30]),  # after 3 minutes
        (1.0, 1.5, [10, 30]),  # not sooner than ten times what one takes; at the end anyway
    ],
)
def test_when_checkpoints_are_made(monkeypatch, seconds_per_step, seconds_per_save, wanted):
    """Every `checkpoint_every` steps, after three minutes at the latest, and no more than a tenth of the time."""
    method = MaskPro(steps=30, minibatch=1, select=False, checkpoint_every=10)
    assert saves(monkeypatch, method, seconds_per_step, seconds_per_save) == wanted
