"""Laws of the learner MaskPro-plus: it learns, resumes, counts its cost, and never returns a worse mask."""

import contextlib
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nmbench.errors import NMBenchError, NumericalFailure
from nmbench.learn import CheckpointStore
from nmbench.options import build
from nmbench.pattern import Pattern
from nmbench.store import FileCheckpoints, MemoryCheckpoints
from nmbench_plugins.maskpro import MaskPro, MaskProPlus
from nmbench_plugins.maskpro.pair_engines import PairTorchEngine
from reference.planted import FOUR_EIGHT, LENGTH, TWO_FOUR, cycles, equal, loss_of, make, planted

LEARNS = {"steps": 150, "prior": 1.0, "minibatch": 8, "check_every": 25, "checkpoint_every": 50}  # enough for the toy
quick = settings(max_examples=20, deadline=None)
ONE_FOUR = Pattern(1, 4)


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
        for kill_at in kills:
            with contextlib.suppress(Killed):
                run(store, method, kill_at, drift)
        resumed = run(store, method, None, drift)
    assert equal(resumed[0], masks)
    assert resumed[1:] == (cost, notes)


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
