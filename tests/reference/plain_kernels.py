"""The kernels of MaskPro in a few lines, with random numbers of their own."""

import torch
from torch import Tensor

from nmbench.pattern import Pattern
from nmbench_plugins.maskpro import policy


class PlainKernels:
    """The functions of `kernels.launch` on the CPU; a mask is drawn again from the generator of its step."""

    def __init__(self) -> None:
        self.drawn: list[tuple[int, int, Tensor]] = []  # step, first group, mask [groups, group]

    def step(self, logits, weight, out, keep, group, *, seed, first_group, step, scale, update, draw):
        rows = logits.view(-1, group)
        if update:
            old = self.mask(rows, keep, seed, first_group, int(step) - 1)
            rows += float(scale) * policy.grad_log_prob(rows, old)
        if draw:
            new = self.mask(rows, keep, seed, first_group, int(step))
            self.drawn.append((int(step), first_group, new))
            out.copy_(torch.where(new.view(weight.shape), weight, 0.0))

    def greedy(self, logits, weight, out, keep, group):
        out.copy_(torch.where(Pattern(keep, group).top(logits), weight, 0.0))

    def mask(self, rows, keep, seed, first_group, step):
        generator = torch.Generator().manual_seed(hash((seed, first_group, step)) % 2**63)
        return policy.sample(rows, keep, generator)
