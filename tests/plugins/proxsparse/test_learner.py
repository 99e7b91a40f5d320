"""Laws of the learner: options, budgets, the search, the start, and what it reports; those of all: test_conformance."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import nmbench as nm
from nmbench.testing.cases import LearnCase
from nmbench_plugins.proxsparse import ProxSparse
from nmbench_plugins.proxsparse import masters as masters_module
from nmbench_plugins.proxsparse.masters import Masters
from nmbench_plugins.proxsparse.operator import prox_
from reference.learners import learnt, resumed_equals_whole

QUICK = ProxSparse(passes=10.0, minibatch=8, learning_rate=1e-2, search=0.3, check_every=16, checkpoint_every=7)


@pytest.mark.parametrize("nothing", [{"tokens": 0}, {"passes": 0.0}])
def test_no_tokens_return_the_start(nothing):
    """With a budget of 0 the masks are those of the start."""
    task, masks = learnt(dataclasses.replace(QUICK, **nothing))
    assert all(mask.equal(task.initial[name]) for name, mask in masks.items())
    assert task.notes["returned"] == "initial"


def test_the_budget_is_in_tokens_and_holds_the_search():
    """The steps of search and training are within the budget together, and the backward tokens are theirs."""
    task, _ = learnt(dataclasses.replace(QUICK, tokens=40 * 96 + 50))
    assert task.notes["steps"] == 40
    assert task.notes["search"]["steps"] == int(0.3 * 40) // 3
    assert task.notes["search"]["tokens"] == len(task.notes["search"]["trials"]) * 4 * 96
    assert task.cost.backward_tokens == 40 * 96


def test_a_search_without_a_training_after_it():
    """If the trials take the whole budget, the lam of the notes is that of the best of them."""
    task, _ = learnt(dataclasses.replace(QUICK, passes=15.0, search=1.0))
    search = task.notes["search"]
    assert len(search["trials"]) * search["steps"] == task.notes["steps"] == 60
    assert task.notes["lam"] == min(search["trials"], key=lambda trial: trial["held_out"])["lam"]


def test_a_given_lam_is_not_searched_for():
    """With `lam` the whole budget is one training at this lam."""
    task, _ = learnt(dataclasses.replace(QUICK, lam=0.5))
    assert task.notes["search"] is None
    assert task.notes["lam"] == {"2:4": 0.5}
    assert {point["lam"] for point in task.curve} == {0.5}


def test_a_worse_mask_is_never_returned():
    """A learner that found nothing better returns the start: here the start is the best mask."""
    task = LearnCase().task()
    task.initial = {name: task.pattern[name].top(weight.abs()) for name, weight in task.dense.items()}
    masks = ProxSparse(passes=0.5, learning_rate=3.0, warmup=0.0, lam=0.0, check_every=2).learn(task)
    assert all(mask.equal(task.initial[name]) for name, mask in masks.items())
    assert task.notes["returned"] == "initial"


def test_what_is_reported():
    """The curve has the loss, the held-out loss, the share of groups that are N:M, the changed share, and lam."""
    task, _ = learnt(QUICK)
    assert {"step", "loss", "held_out", "sparse", "changed", "lam"} == set(task.curve[-1])
    assert task.curve[-1]["lam"] == task.notes["lam"]["2:4"]
    strong, _ = learnt(dataclasses.replace(QUICK, lam=1e3))
    assert task.curve[-1]["sparse"] < strong.curve[-1]["sparse"] == 1


def test_presets_learn():
    """The setting of the paper, at a step size for this model, finds the planted answer."""
    task, _ = learnt(ProxSparse(**{**ProxSparse.presets["paper"], "learning_rate": 1e-2}))
    assert task.notes["returned"] == "learnt"


@pytest.mark.parametrize("event", [5, 16, 36])
def test_a_resumed_run_has_the_same_masks(tmp_path, event):
    """Killed in the search or later, a run ends with the masks and tokens of a run that was not."""
    method = dataclasses.replace(QUICK, kl=0.5)
    resumed_equals_whole(method, tmp_path, event, 7)


@pytest.mark.parametrize("part", [2**17, 50])
def test_the_operator_sees_every_group_of_every_pattern(monkeypatch, part):
    """However few groups are taken at once, every layer has the prox of its own pattern."""
    monkeypatch.setattr(masters_module, "PART", {"cpu": part})
    task = LearnCase("2:4", "1:4").task()
    masters = Masters(task, 0.5)
    before = {name: master.clone() for name, master in masters.layers.items()}
    lam = {nm.Pattern(2, 4): 0.7, nm.Pattern(1, 4): 0.2}
    masters.penalise(lam)
    for name, pattern in task.pattern.items():
        expected = prox_(before[name].view(-1, pattern.group), lam[pattern], pattern.keep, 10**6)
        torch.testing.assert_close(masters.layers[name], expected.view(before[name].shape))


def test_masters_begin_at_the_dense_weights():
    """Weights that the start keeps begin at the dense weight, all others at the share `shrink` of it."""
    task = LearnCase("4:8").task()
    for name, master in Masters(task, 0.25).layers.items():
        assert master.equal(task.dense[name] * torch.where(task.initial[name], 1.0, 0.25))


@pytest.mark.parametrize(
    "options",
    [
        {"kl": 1.5},
        {"shrink": -0.5},
        {"search": 2.0},
        {"warmup": -1.0},
        {"lam": -1.0},
        {"lam": float("inf")},
        {"trials": 0},
        {"passes": -1.0},
        {"learning_rate": 0.0},
        {"minibatch": 0},
        {"window_tokens": 1},
    ],
)
def test_impossible_options_are_refused(options):
    """An impossible value is one line that names the option."""
    with pytest.raises(nm.NMBenchError, match=f"option proxsparse.{next(iter(options))} must"):
        ProxSparse(**options)
