"""A reference with backpropagation: the straight-through gradient of the logits that MaskPro learns.

    nmbench run --plugin benchmarks/straight_through.py --method straight-through

Each step computes the loss with the greedy mask; the backward pass takes the mask for the logits (Bengio et al., arXiv
1308.3432), so that the gradient of a logit is that of the masked weight times the weight. The optimiser is Adam, with a
learning rate that falls linearly to 0. The mask with the lowest loss on the selection windows is returned. This is no
method of nmbench: it shows the result of a learner with the gradient of every weight in as many tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import nmbench


class Masked(torch.autograd.Function):
    """The weight under the greedy mask; the backward pass takes the mask for the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, weight: Tensor, pattern: nmbench.Pattern) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.where(pattern.top(logits), weight, torch.zeros_like(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return (gradients[0] * weight).float(), None, None


@dataclass(frozen=True)
class StraightThrough(nmbench.MaskLearner):
    """Learn mask logits by the straight-through gradient; weights stay dense. A reference: it needs backpropagation."""

    init: str = nmbench.option("wanda", "method whose mask is the starting point")
    steps: int = nmbench.option(700, "updates of the logits", unit="steps")
    learning_rate: float = nmbench.option(0.01, "of Adam, at the first step")
    prior: float = nmbench.option(1.0, "logits start at this value times the initial mask")
    minibatch: int = nmbench.option(32, "windows per step", unit="windows")
    window_tokens: int = nmbench.option(128, "window length", unit="tokens")
    check_every: int = nmbench.option(50, "steps between two looks at the selection windows", unit="steps")

    def learn(self, task: nmbench.LearnTask) -> Mapping[str, Tensor]:
        """Return the greedy mask with the lowest loss on the selection windows."""
        device = task.bundle.device
        logits = {n: (mask.to(device).float() * self.prior).requires_grad_() for n, mask in task.initial.items()}
        optimizer = torch.optim.Adam(list(logits.values()), lr=self.learning_rate)
        batches = task.batches(self.minibatch, task.generator, task.windows(self.window_tokens))
        log: list[dict[str, float]] = []
        best = dict(task.initial)
        with task.live_weights() as live:

            def provider(name: str) -> Tensor:
                return Masked.apply(logits[name], live.original(name), task.pattern[name])

            with live.provided(provider):
                for step in range(self.steps + 1):
                    if step % self.check_every == 0 or step == self.steps:
                        with torch.no_grad():
                            held_out = float(task.loss(task.selection).double().mean())
                        masks = {name: task.pattern[name].top(value.detach()).cpu() for name, value in logits.items()}
                        best = masks if held_out < min([torch.inf, *(e["held_out"] for e in log)]) else best
                        log.append({"step": step, "held_out": held_out, "forward_tokens": task.cost.forward_tokens})
                        task.report(step, masks=masks, held_out=held_out)
                    if step < self.steps:
                        optimizer.param_groups[0]["lr"] = self.learning_rate * (1 - step / self.steps)
                        optimizer.zero_grad()
                        with torch.enable_grad():
                            task.loss(next(batches).tokens).mean().backward()
                        optimizer.step()
        task.notes["log"] = log
        return best


@nmbench.hookimpl
def nmbench_register_mask_learners(register: nmbench.Register) -> None:
    register("straight-through", StraightThrough)
