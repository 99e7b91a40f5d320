"""Laws of the learner: options, budgets, the start, and what it reports. The laws of all learners: test_conformance."""

from __future__ import annotations

import dataclasses

import pytest

import nmbench as nm
from nmbench.testing.cases import LearnCase
from nmbench_plugins.soft import Soft
from reference.learners import learnt, resumed_equals_whole

QUICK = Soft(passes=10.0, minibatch=8, learning_rate=5e-3, check_every=16, checkpoint_every=9)


@pytest.mark.parametrize("nothing", [{"tokens": 0}, {"passes": 0.0}])
def test_no_tokens_return_the_start(nothing):
    """With a budget of 0 the masks are those of the start."""
    task, masks = learnt(dataclasses.replace(QUICK, **nothing))
    assert all(mask.equal(task.initial[name]) for name, mask in masks.items())
    assert task.notes["returned"] == "initial"


def test_the_budget_is_in_tokens():
    """The tokens of all steps are at most the budget, and the backward tokens are these."""
    task, _ = learnt(dataclasses.replace(QUICK, tokens=500))
    assert task.notes["steps"] == 500 // (8 * 12)
    assert task.cost.backward_tokens == 5 * 8 * 12


def test_a_worse_mask_is_never_returned():
    """A learner that found nothing better returns the start: here the start is the best mask."""
    case = LearnCase("2:4")
    task = case.task()
    task.initial = {name: task.pattern[name].top(weight.abs()) for name, weight in task.dense.items()}
    masks = Soft(passes=2.0, learning_rate=1.0, fall=1.0, check_every=2).learn(task)
    assert all(mask.equal(task.initial[name]) for name, mask in masks.items())
    assert task.notes["returned"] == "initial"


def test_what_is_reported():
    """The curve has soft and hard loss, the held-out loss, the share of changed groups and the temperature."""
    task, _ = learnt(QUICK)
    assert {"step", "soft", "hard", "held_out", "changed", "temperature"} == set(task.curve[-1])
    assert task.curve[-1]["temperature"] == pytest.approx(0.05)
    assert task.curve[-1]["changed"] > 0


@pytest.mark.parametrize("preset", sorted(Soft.presets))
def test_presets_learn(preset):
    """Every preset finds the planted answer in part, from the worst masks."""
    method = Soft(**{**Soft.presets[preset], "passes": 30.0, "minibatch": 8, "learning_rate": 5e-3, "check_every": 30})
    task, _ = learnt(method)
    assert task.notes["returned"] == "learnt"


@pytest.mark.parametrize(("estimator", "event"), [("soft", 11), ("soft", 30), ("straight-through", 20)])
def test_a_resumed_run_has_the_same_masks(tmp_path, estimator, event):
    """Killed after the first checkpoint or later, a run ends with the masks and tokens of a run that was not."""
    method = dataclasses.replace(QUICK, estimator=estimator, kl=0.5)
    resumed_equals_whole(method, tmp_path, event, 9)


@pytest.mark.parametrize(
    "options",
    [
        {"kl": 1.5},
        {"leave": 0.0},
        {"leave": 1.0},
        {"passes": -1.0},
        {"learning_rate": 0.0},
        {"first_noise": 0.0},
        {"last_noise": float("inf")},
        {"minibatch": 0},
        {"window_tokens": 1},
        {"fall": -0.1},
    ],
)
def test_impossible_options_are_refused(options):
    """An impossible value is one line that names the option."""
    with pytest.raises(nm.NMBenchError, match=f"option soft.{next(iter(options))} must"):
        Soft(**options)
