"""Runs of a mask learner on the planted case of the test kit, whole or killed and resumed."""

from __future__ import annotations

import functools
from pathlib import Path

import nmbench as nm
from nmbench.results.files import FileCheckpoints
from nmbench.testing.cases import LearnCase


def learnt(method: nm.MaskLearner, **case):
    """The task and the masks of one run."""
    task = LearnCase(**case).task()
    return task, method.learn(task)


@functools.lru_cache(maxsize=8)
def whole_run(method: nm.MaskLearner):
    """The task and the masks of a run that is not killed, for all the kills that it is compared with."""
    task, masks = learnt(method)
    return task, masks, task.settle()


def resumed_equals_whole(method: nm.MaskLearner, folder: Path, event: int, first_checkpoint: int) -> None:
    """Assert that a run killed at a progress event and resumed has the masks, cost and notes of one that was not."""
    whole, masks, cost = whole_run(method)
    store = FileCheckpoints(folder / "learner.safetensors", "the same job")
    killed = LearnCase().task(store)
    with killed.interrupted_at(event) as events:
        method.learn(killed)
    assert events[0] == event + 1  # it was killed
    assert store.load() is not None or event < first_checkpoint
    resumed = LearnCase().task(store)
    again = method.learn(resumed)
    assert all(mask.equal(again[name]) for name, mask in masks.items())
    assert resumed.settle() == cost
    assert lasting(resumed.notes) == lasting(whole.notes)


def lasting(notes: dict) -> dict:
    """The notes without seconds, which differ from run to run."""
    return {
        name: lasting(value) if isinstance(value, dict) else value for name, value in notes.items() if name != "seconds"
    }
