"""Laws of the learner: options, budgets, the start, and what it reports. The laws of all learners: test_conformance."""

from __future__ import annotations

import dataclasses

import pytest

import nmbench as nm
from nmbench.testing.cases import LearnCase
from nmbench_plugins.maskllm import MaskLLM
from reference.learners import learnt, resumed_equals_whole

QUICK = MaskLLM(passes=10.0, minibatch=8, learning_rate=2e-3, check_every=16, checkpoint_every=9)


@pytest.mark.parametrize("nothing", [{"tokens": 0}, {"passes": 0.0}])
def test_no_tokens_return_the_start(nothing):
    """With a budget of 0 the masks are those of the start."""
    task, masks = learnt(dataclasses.replace(QUICK, **nothing))
    assert all(mask.equal(task.initial[name]) for name, mask in masks.items())
    assert task.notes["returned"] == "initial"


def test_a_worse_mask_is_never_returned():
    """A learner that found nothing better returns the start: here it learns from text that runs backwards."""
    task = LearnCase("2:4").task()
    task.initial = {name: task.pattern[name].top(weight.abs()) for name, weight in task.dense.items()}
    task.pool.copy_(task.pool.flip(1))
    masks = dataclasses.replace(QUICK, kl=0.0).learn(task)
    assert task.curve[-1]["changed"] > 0
    assert all(mask.equal(task.initial[name]) for name, mask in masks.items())
    assert task.notes["returned"] == "initial"


def test_what_is_reported():
    """The curve has soft and hard loss, held-out loss, share of changed groups, temperature and scale; budgets hold."""
    task, _ = learnt(dataclasses.replace(QUICK, tokens=3100))
    assert {"step", "soft", "hard", "held_out", "changed", "temperature", "scale"} == set(task.curve[-1])
    assert (task.curve[-1]["temperature"], task.curve[-1]["scale"]) == pytest.approx((0.05, QUICK.last_scale))
    assert task.curve[-1]["changed"] > 0
    assert task.notes["steps"] == 3100 // (8 * 12)
    assert task.cost.backward_tokens == 32 * 8 * 12


@pytest.mark.parametrize("annealing", ["linear", "exponential"])
def test_the_published_form_learns(annealing):
    """Preset `paper` on a small budget finds the planted answer in part, from the worst masks."""
    small = {"tokens": None, "passes": 30.0, "minibatch": 8, "learning_rate": 5e-3, "check_every": 30}
    task, _ = learnt(MaskLLM(**{**MaskLLM.presets["paper"], **small, "annealing": annealing}))
    assert task.notes["returned"] == "learnt"


def test_the_memory_is_that_of_the_gates():
    """A weight has C(M, N) / M gates of 12 bytes, 8 with short moments, and a gradient and a dense weight."""
    four_eight = nm.Pattern(4, 8)
    assert MaskLLM().bytes_per_weight(2) == 12 * 1.5 + 4
    assert MaskLLM().bytes_at(four_eight, 4) == 12 * 8.75 + 8
    assert MaskLLM(moments="bfloat16").bytes_at(four_eight, 4) == 8 * 8.75 + 8


def test_short_moments_learn():
    """With moments in bfloat16 the learner finds the planted answer in part, too."""
    task, _ = learnt(dataclasses.replace(QUICK, moments="bfloat16"))
    assert task.notes["returned"] == "learnt"


@pytest.mark.parametrize("event", [11, 30])
def test_a_resumed_run_has_the_same_masks(tmp_path, event):
    """Killed after the first checkpoint or later, a run ends with the masks and tokens of a run that was not."""
    method = dataclasses.replace(QUICK, kl=0.5, reward=1e-5)
    resumed_equals_whole(method, tmp_path, event, 9)


@pytest.mark.parametrize(
    "options",
    [
        {"kl": 1.5},
        {"leave": 1.0},
        {"passes": -1.0},
        {"learning_rate": 0.0},
        {"first_temperature": 0.0},
        {"last_scale": float("inf")},
        {"annealed": 0.0},
        {"reward": -1.0},
        {"minibatch": 0},
        {"window_tokens": 1},
        {"fall": -0.1},
    ],
)
def test_impossible_options_are_refused(options):
    """An impossible value is one line that names the option."""
    with pytest.raises(nm.NMBenchError, match=f"option maskllm.{next(iter(options))} must"):
        MaskLLM(**options)
