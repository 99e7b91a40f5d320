"""The masks of one block after the other, by the outputs of the block; then the whole model confirms them.

For a block with weights W, inputs X on the pruned path and Y on the dense path, and the dense block f, the steps are
those of the whole model, with the loss

    |g(X; W * m) - T|^2 / |T|^2,    T = (1 - a) f(X) + a f(Y)

divided by its value under the start, where g is the block under other weights, m its soft masks, and a the option
`target`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import nmbench
from nmbench.evaluation import groups_changed
from nmbench.pruning import Budget, PartReplay, StepSettings, in_passes, relative_error, squared_errors
from nmbench_plugins.soft.logits import Logits
from nmbench_plugins.soft.relaxed import SCALES, Relaxed
from nmbench_plugins.soft.schedule import Schedule, Setting

if TYPE_CHECKING:
    from nmbench_plugins.soft.learner import Soft

Masks = Mapping[str, Tensor]
TOLERANCE_NATS = 0.0  # masks are returned only if they are better than their start


def learnt_by_blocks(method: Soft, task: nmbench.LearnTask) -> Masks:
    """Return the masks learnt block by block if held-out windows confirm them, else those of the start."""
    selection: nmbench.Selection[Masks] = nmbench.Selection(task, task.initial, TOLERANCE_NATS)
    budget = Budget.of(task, method)
    schedule = Schedule(budget.steps, method.noise, method.learning_rate, method.fall)

    def learn(block: nmbench.BlockTask) -> Masks:
        return learnt(block, method, schedule)

    read = budget.windows, budget.minibatch
    masks = task.learn_blocks(learn, *read, dense_path=method.target != 0) if budget.steps else task.initial
    chosen = confirmed(task, selection, masks)
    task.notes.update(
        {
            "steps": budget.steps,
            **selection.notes(),
            "groups_changed": groups_changed(chosen, task.initial, task.pattern),
            "groups_changed_by_blocks": groups_changed(masks, task.initial, task.pattern),
        }
    )
    return chosen


@torch.no_grad()
def confirmed(task: nmbench.LearnTask, selection: nmbench.Selection[Masks], masks: Masks) -> Masks:
    """Return `masks` if they are better on both halves of the selection windows, else those of the start."""
    with task.live_weights() as live:

        def measure(windows: Tensor, masks: Masks) -> Tensor:
            live.apply(masks)
            return task.loss(windows)

        selection.start(measure(selection.looked_at, task.initial))
        selection.look(len(task.bundle.blocks), masks, measure(selection.looked_at, masks))
        return selection.verdict(measure)


def learnt(block: nmbench.BlockTask, method: Soft, schedule: Schedule) -> Masks:
    """Return the learnt masks of a block, by layer name; none if the error of the block did not fall."""
    targets = [block.target(number, method.target).to(block.host) for number in range(block.batches)]
    before = relative_error(block, targets, {})
    masks = greedy_masks(block, targets, method, schedule, before) if before else {}
    kept = {name: block.dense[name].masked_fill(~mask, 0.0) for name, mask in masks.items()}
    after = relative_error(block, targets, kept) if masks else before
    if not (math.isfinite(before) and math.isfinite(after)):
        raise nmbench.NumericalFailure(f"the error of the block is {after}, from {before}; lower the learning_rate.")
    better = after < before
    changed = groups_changed(masks, block.masks, block.pattern) if better else 0.0
    block.report(error_before=before, error_after=after if better else before, changed=changed)
    return masks if better else {}


@torch.no_grad()
def greedy_masks(
    block: nmbench.BlockTask, targets: Sequence[Tensor], method: Soft, schedule: Schedule, before: float
) -> Masks:
    """Return the masks of the largest logits of a block after all steps of `schedule`, where the block is.

    `before`: the relative error of the block under the start.
    """
    generator = block.generator
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    start = (block.pattern, block.masks, generator.device, method.leave, method.noise[0])
    logits = Logits(*start, getattr(torch, method.moments))
    steps = BlockSteps(block, targets, logits, method.straight, seed, before)
    for step, number in zip(range(schedule.steps), in_passes(block.batches, generator), strict=False):
        steps.take(number, schedule.at(step))
        block.progress(step + 1, schedule.steps)
    return {name: logits.greedy(name) for name in logits.values}


class BlockSteps:
    """Updates of the `logits` of a block by the relative error of its outputs, which is `before` under the start.

    `targets`: the outputs that each batch of the block should have; `straight` as for `Relaxed`; `seed`: of the noise.
    """

    def __init__(
        self,
        block: nmbench.BlockTask,
        targets: Sequence[Tensor],
        logits: Logits,
        straight: bool,
        seed: int,
        before: float,
    ) -> None:
        self.settings = StepSettings(logits.device, SCALES, seed)
        self.relaxed = Relaxed(logits, straight, self.settings)
        self.dense, self.before = block.dense, before
        self.replay = PartReplay(block, targets, self._update)

    def take(self, number: int, setting: Setting) -> None:
        """Update the logits by batch `number`."""
        if self.replay.due:
            self.settings.hold()
            self.replay.capture()
        self.settings.begin(setting.step, setting.rate, (setting.temperature, setting.noise))
        self.replay(number)

    def _update(self, part: nmbench.Part, number: int, target: Tensor) -> None:
        layers = list(self.relaxed.logits.values)
        weights = {n: self.relaxed.weight(i, n, self.dense[n]).requires_grad_() for i, n in enumerate(layers)}
        with torch.enable_grad():
            errors = squared_errors(part, number, target, weights)
            loss = errors.mean() / (self.before * target.to(errors.device).float().square().mean())
            gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
        for index, (name, gradient) in enumerate(zip(layers, gradients, strict=True)):
            self.relaxed.learn(index, name, self.dense[name], gradient)
