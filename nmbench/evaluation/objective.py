"""The objective of training: cross-entropy of the text, divergence from the dense model, or a mix of both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """(1 - `kl`) x cross-entropy + `kl` x KL(dense || pruned), in nats per token."""

    kl: float = 0.0


def objective_losses(logits: Tensor, tokens: Tensor, objective: Objective, teacher: Tensor | None) -> Tensor:
    """Return the mean objective of each window, float32 `[n]`, with gradients to `logits`.

    `logits` `[n, window_tokens, vocabulary]`; `tokens` int64 `[n, window_tokens]`; `teacher`: logits of the dense model
    of the same shape, None if `objective.kl` is 0. The last position, which has no target, is left out of both terms.
    """
    means = [
        window_objective(own[:-1].float(), text[1:], objective, None if teacher is None else teacher[i, :-1].float())
        for i, (own, text) in enumerate(zip(logits, tokens, strict=True))
    ]
    return torch.stack(means)


def window_objective(logits: Tensor, targets: Tensor, objective: Objective, teacher: Tensor | None) -> Tensor:
    """Return the mean objective of one window: float32 logits `[targets, vocabulary]` -> scalar."""
    log_probs = F.log_softmax(logits, dim=-1)
    loss = (1 - objective.kl) * F.nll_loss(log_probs, targets)
    if teacher is not None:
        divergence = F.kl_div(log_probs, F.log_softmax(teacher, dim=-1), reduction="batchmean", log_target=True)
        loss = loss + objective.kl * divergence
    return loss
