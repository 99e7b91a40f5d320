"""The published MaskPro algorithm (arXiv 2506.12876), written out from its formulas: slow, float64, nothing shared.

Masks are given, not drawn: what is compared is what a learner makes of them.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import permutations

import torch
from torch import Tensor

Masks = Mapping[str, Tensor]  # layer name -> bool [groups, group]


def learn(
    initial: Masks,
    drawn: Sequence[Masks],
    loss: Callable[[int, Masks], float],
    learning_rate: float,
    prior: float,
    decay: float = 0.99,
) -> tuple[dict[str, Tensor], float]:
    """Logits float64 [groups, group] and tracker after as many steps as masks; `loss(k, masks)` is f on minibatch k."""
    logits = {name: prior * mask.double() for name, mask in initial.items()}
    delta = 0.0
    for step, masks in enumerate(drawn):
        residual = loss(step, masks) - loss(step, initial)
        delta = decay * delta + (1 - decay) * residual
        for name, mask in masks.items():
            variable = logits[name].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(log_prob(variable, mask).sum(), variable)
            logits[name] = logits[name] - learning_rate * (residual - delta) * gradient
    return logits, delta


def log_prob(logits: Tensor, mask: Tensor) -> Tensor:
    """log P of every group [groups]: the sum over all orders in which its set can be drawn without replacement."""
    members = mask.nonzero()[:, 1].view(len(mask), -1)  # [groups, keep]
    terms = []
    for order in permutations(range(members.shape[1])):
        left = torch.zeros_like(logits)
        term = torch.zeros(len(mask), dtype=logits.dtype)
        for k in order:
            member = members[:, k : k + 1]
            term = term + logits.gather(1, member)[:, 0] - (logits + left).logsumexp(1)
            left = left.scatter(1, member, -torch.inf)
        terms.append(term)
    return torch.stack(terms).logsumexp(0)
