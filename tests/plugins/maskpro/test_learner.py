"""Laws of the MaskPro learner (arXiv 2506.12876): its update, its resumption, and the guard against worse masks."""

from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.errors import NMBenchError
from nmbench.models.dense_weights import DenseWeights
from nmbench.options import build
from nmbench.pattern import Pattern
from nmbench.pruning.learning import LearnTask
from nmbench.results.files import MemoryCheckpoints
from nmbench_plugins.maskpro import MaskPro
from nmbench_plugins.tiny import TinyModel
from reference import maskpro as reference
from reference.planted import (
    FOUR_EIGHT,
    LENGTH,
    TWO_FOUR,
    cycles,
    equal,
    loss_of,
    make,
    planted,
    record_draws,
    weakest,
)

LEARNS = {"steps": 150, "prior": 1.0, "minibatch": 4, "check_every": 25, "checkpoint_every": 50}  # enough for the toy
quick = settings(max_examples=12, deadline=None)


# The update


@pytest.mark.parametrize(
    ("patterns", "options"),
    [
        ((TWO_FOUR, FOUR_EIGHT), {"learning_rate": "3", "prior": "2"}),
        ((TWO_FOUR, TWO_FOUR), {"learning_rate": "3", "prior": "2"}),
        ((TWO_FOUR, TWO_FOUR), {}),
        pytest.param((FOUR_EIGHT, FOUR_EIGHT), {"learning_rate": "3", "prior": "2"}, marks=pytest.mark.slow),
        pytest.param((TWO_FOUR, FOUR_EIGHT), {}, marks=pytest.mark.slow),
        pytest.param((FOUR_EIGHT, FOUR_EIGHT), {}, marks=pytest.mark.slow),
    ],
)
def test_preset_paper_takes_the_papers_steps(monkeypatch, patterns, options):
    """25 steps of the preset are the published ones, minibatch after minibatch, computed from the formulas alone."""
    small = {"steps": "25", "window_tokens": str(LENGTH), "pool_windows": "30", "minibatch": "4"}
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
    """Forward tokens are those of the reference, the steps, the measurements and, unless the initial mask is the best,
    the confirmation; nothing goes backward.
    """
    task = make()
    MaskPro(steps=10, minibatch=4, check_every=5).learn(task)
    reference_, steps, measured = 32, 10 * 4, 3 * 8  # windows
    confirmation = 2 * 8 if task.notes["best_step"] else 0
    assert task.settle().forward_tokens == LENGTH * (reference_ + steps + measured + confirmation)
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
