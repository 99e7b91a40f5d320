"""Laws of one run of MaskPro: its resumption, its checkpoints, and its end at a loss that is not finite."""

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

from nmbench.errors import NumericalFailure
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.pruning.learning import CheckpointStore, LearnTask
from nmbench.results.files import FileCheckpoints, MemoryCheckpoints
from nmbench_plugins.maskpro import MaskPro, training
from reference.planted import FOUR_EIGHT, TWO_FOUR, Planted, cycles, equal, make, planted, weakest

quick = settings(max_examples=12, deadline=None)


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


@settings(max_examples=6, deadline=None)
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
    store, reported = MemoryCheckpoints(), []
    method = MaskPro(steps=15, minibatch=4, select=False, checkpoint_every=10)
    with pytest.raises(Killed):
        run(store, method, 8 + 12)  # the reference takes 8 events, and is in the checkpoint
    task = make(store=store, patterns=(TWO_FOUR, FOUR_EIGHT), on_report=lambda *event: reported.append(event[:2]))
    method.learn(task)
    assert reported == [("learn", step) for step in range(11, 16)]


# Losses that are not finite


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
