"""Laws of an update: the gradient of the logits is that of the loss, and of parts as of the whole."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from nmbench.evaluation import Objective, objective
from nmbench.pruning import BETAS, pace_of
from nmbench.testing.cases import LearnCase
from nmbench_plugins.soft import logits as logits_module
from nmbench_plugins.soft.logits import Logits
from nmbench_plugins.soft.relaxation import as_rows, columns, soft_mask
from nmbench_plugins.soft.schedule import Setting
from nmbench_plugins.soft.steps import Steps

SETTING = Setting(0, 0.5, 0.02, 1e-3)


def of_task(task, leave: float) -> Logits:
    """The logits of all layers of a task, with noise scale 0.02."""
    return Logits(task.pattern, task.initial, task.bundle.device, leave, 0.02)


def plain_gradient(steps: Steps, live, tokens, straight: bool):
    """The gradient of the logits by autograd through the whole model, layer name -> `[out, units]`."""
    leaves = {name: value.clone().requires_grad_() for name, value in steps.logits.values.items()}
    weights = {}
    for number, (name, leaf) in enumerate(leaves.items()):
        pattern = steps.logits.patterns[name]
        groups = columns(leaf, pattern.units.group)
        if straight:
            mask = (
                pattern.units.top(leaf.detach().reshape(-1, pattern.units.group)).t().float() + groups - groups.detach()
            )
        else:
            noise = steps.relaxed._drawn(number, name, slice(0, len(leaf))) - columns(
                steps.logits.values[name] / steps.relaxed.scales[1], pattern.units.group
            )
            mask = soft_mask(groups / steps.relaxed.scales[1] + noise, steps.relaxed.scales[0], pattern.units.keep)
        where = live.bundle.layers[name].where.stored
        weights[where] = pattern.whole(as_rows(mask, leaf.shape)) * live.dense(name)
    out = functional_call(live.task.model, weights, (tokens,)).logits
    teacher = live.teacher_logits(tokens)
    objective.objective_losses(out, tokens, steps.objective, teacher).mean().backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("straight", [False, True])
@pytest.mark.parametrize(("part", "pattern"), [(2**17, "2:4"), (40, "2:4x2")])
def test_the_gradient_of_the_logits_is_that_of_autograd(monkeypatch, straight, part, pattern):
    """The first moment after one step is a tenth of the gradient by autograd, however few rows are computed at once."""
    monkeypatch.setattr(logits_module, "PART", {"cpu": part})
    task = LearnCase(pattern, "1:4").task()
    tokens = task.pool[:8]
    with task.gradients() as live:
        steps = Steps(live, of_task(task, 0.4), Objective(0.5), straight, seed=5)
        steps.take(tokens, SETTING)
        learnt = {name: moment.clone() for name, moment in steps.logits.first.items()}
        steps.logits = steps.relaxed.logits = of_task(task, 0.4)
        with torch.enable_grad():
            expected = plain_gradient(steps, live, tokens, straight)
    for name, gradient in expected.items():
        torch.testing.assert_close(learnt[name], 0.1 * gradient, rtol=1e-4, atol=1e-7)


def test_the_step_is_that_of_adam():
    """Two updates are those of `torch.optim.Adam`."""
    task = LearnCase().task()
    logits = of_task(task, 0.2)
    name, value = next(iter(logits.values.items()))
    own = value.clone().requires_grad_()
    adam = torch.optim.Adam([own], lr=1e-3, betas=BETAS)
    for step in range(2):
        gradient = torch.randn(own.shape, generator=torch.Generator().manual_seed(step))
        own.grad = gradient
        adam.step()
        logits.update(name, slice(0, len(value)), gradient, torch.tensor(pace_of(1e-3, step)))
    torch.testing.assert_close(value, own.detach(), rtol=1e-5, atol=1e-8)


def test_an_update_at_pace_0_changes_nothing():
    """With `pace` 0, as while a CUDA graph is captured, logits and moments stay as they are."""
    task = LearnCase().task()
    with task.gradients() as live:
        steps = Steps(live, of_task(task, 0.2), Objective(), False, seed=0)
        before = {name: value.clone() for name, value in steps.logits.values.items()}
        steps._update(task.pool[:4])
    assert all(value.equal(before[name]) for name, value in steps.logits.values.items())
    assert not any(moment.any() for moment in (*steps.logits.first.values(), *steps.logits.second.values()))


def test_moments_may_be_short():
    """Moments in bfloat16 take the same first step to rounding, and half the bytes."""
    moved = {}
    for moments in (torch.float32, torch.bfloat16):
        task = LearnCase().task()
        with task.gradients() as live:
            steps = Steps(
                live,
                Logits(task.pattern, task.initial, task.bundle.device, 0.2, 0.02, moments),
                Objective(),
                False,
                seed=0,
            )
            before = {name: value.clone() for name, value in steps.logits.values.items()}
            steps.take(task.pool[:4], SETTING)
            moved[moments] = {name: value - before[name] for name, value in steps.logits.values.items()}
            assert {moment.dtype for moment in (*steps.logits.first.values(), *steps.logits.second.values())} == {
                moments
            }
    for name, step in moved[torch.float32].items():
        torch.testing.assert_close(moved[torch.bfloat16][name], step, rtol=1e-3, atol=1e-8)


def test_the_start_is_the_greedy_mask():
    """Logits of the start have the masks of the start, and the dense weights come back at the end."""
    task = LearnCase("4:8").task()
    dense = {name: weight.clone() for name, weight in task.dense.items()}
    with task.gradients() as live:
        steps = Steps(live, of_task(task, 0.2), Objective(), False, seed=0)
        steps.take(task.pool[:4], Setting(0, 1.0, 0.02, 0.0))
        live.apply(steps.masks())
        for name, mask in task.initial.items():
            assert steps.masks()[name].equal(mask)
            assert live.bundle.layers[name].read().equal(dense[name].masked_fill(~mask, 0.0))
    for name, layer in task.bundle.layers.items():
        assert layer.read().equal(dense[name])
        assert not layer.module.get_parameter(layer.where.parameter).requires_grad
