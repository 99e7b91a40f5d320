"""Laws of an update: the gradient of the gates is that of the loss, and of parts as of the whole."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from nmbench.evaluation import Objective, objective
from nmbench.pruning import BETAS, pace_of
from nmbench.testing.cases import LearnCase
from nmbench_plugins.maskllm import gates as gates_module
from nmbench_plugins.maskllm.gates import Gates
from nmbench_plugins.maskllm.schedule import Setting
from nmbench_plugins.maskllm.steps import Steps

SETTING = Setting(0, 0.5, 100.0, 1e-2, 1e-3)


def plain_gradient(steps: Steps, live, tokens):
    """The gradient of the gates by autograd through the whole model, layer name -> `[C, groups]`."""
    leaves = {name: value.clone().requires_grad_() for name, value in steps.gates.values.items()}
    weights, kept = {}, 0.0
    for number, (name, leaf) in enumerate(leaves.items()):
        whole = slice(0, leaf.shape[1])
        keys = steps.shares(number, name, whole).log() * SETTING.temperature  # up to a constant a group
        keys = keys + SETTING.scale * (leaf - leaf.detach())
        mask = torch.softmax(keys / SETTING.temperature, dim=0).t() @ steps.gates.of(name)  # [groups, M]
        weight = mask.reshape(live.dense(name).shape) * live.dense(name)
        weights[live.bundle.layers[name].where.stored] = weight
        kept = kept + weight.square().sum()
    out = functional_call(live.task.model, weights, (tokens,)).logits
    losses = objective.objective_losses(out, tokens, steps.objective, live.teacher_logits(tokens))
    (losses.mean() - SETTING.reward * kept).backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize(("part", "pattern"), [(2**17, "2:4"), (40, "2:4x2")])
def test_the_gradient_of_the_gates_is_that_of_autograd(monkeypatch, part, pattern):
    """The first moment after one step is a tenth of the gradient by autograd, however few rows are computed at once."""
    monkeypatch.setattr(gates_module, "PART", {"cpu": part})
    task = LearnCase(pattern, "1:4").task()
    tokens = task.pool[:8]
    with task.gradients() as live:
        steps = Steps(live, Gates(task, 0.4, 100.0), Objective(0.5), seed=5)
        steps.take(tokens, SETTING)
        learnt = {name: moment.clone() for name, moment in steps.gates.first.items()}
        steps.gates = Gates(task, 0.4, 100.0)
        with torch.enable_grad():
            expected = plain_gradient(steps, live, tokens)
    for name, gradient in expected.items():
        torch.testing.assert_close(learnt[name], 0.1 * gradient, rtol=1e-3, atol=1e-6)


def test_the_step_is_that_of_adam():
    """Two updates of some groups are those of `torch.optim.Adam` with the epsilon of the paper."""
    task = LearnCase().task()
    gates = Gates(task, 0.2, 100.0)
    name, value = next(iter(gates.values.items()))
    own = value[:, 3:9].clone().requires_grad_()
    adam = torch.optim.Adam([own], lr=1e-3, betas=BETAS, eps=1e-5)
    for step in range(2):
        own.grad = 1e-4 * torch.randn(own.shape, generator=torch.Generator().manual_seed(step))
        adam.step()
        gates.update(name, slice(3, 9), own.grad, torch.tensor(pace_of(1e-3, step)))
    torch.testing.assert_close(value[:, 3:9], own.detach(), rtol=1e-5, atol=1e-8)


def test_an_update_at_pace_0_changes_nothing():
    """With `pace` 0, as while a CUDA graph is captured, gates and moments stay as they are."""
    task = LearnCase().task()
    with task.gradients() as live:
        steps = Steps(live, Gates(task, 0.2, 100.0), Objective(), seed=0)
        before = {name: value.clone() for name, value in steps.gates.values.items()}
        steps._update(task.pool[:4])
    assert all(value.equal(before[name]) for name, value in steps.gates.values.items())
    assert not any(moment.any() for moment in (*steps.gates.first.values(), *steps.gates.second.values()))


def test_the_start_is_the_greedy_mask():
    """Gates of the start have the masks of the start, and the dense weights come back at the end."""
    task = LearnCase("4:8").task()
    dense = {name: weight.clone() for name, weight in task.dense.items()}
    with task.gradients() as live:
        steps = Steps(live, Gates(task, 0.2, 100.0), Objective(), seed=0)
        steps.take(task.pool[:4], Setting(0, 1.0, 100.0, 0.0, 0.0))
        live.apply(steps.masks())
        for name, mask in task.initial.items():
            assert steps.masks()[name].equal(mask)
            assert live.bundle.layers[name].read().equal(dense[name].masked_fill(~mask, 0.0))
    assert all(layer.read().equal(dense[name]) for name, layer in task.bundle.layers.items())


def test_of_equal_gates_the_lower_places_are_kept():
    """The mask of equal gates keeps the first N of every group, as `Pattern.top` does of equal scores."""
    task = LearnCase("2:4").task()
    gates = Gates(task, 0.99, 100.0)  # an even draw
    for name, shape in task.layers.items():
        assert gates.greedy(name).equal(task.pattern[name].top(torch.zeros(shape)))
