"""The objective of training: cross-entropy of the text, divergence from the dense model, or a mix of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """(1 - `kl`) x cross-entropy + `kl` x KL(dense || pruned), in nats per token."""

    kl: float = 0.0


def objective_losses(
    logits: Tensor,
    tokens: Tensor,
    objective: Objective,
    teacher: Tensor | None,
    each: Callable[[Tensor, Tensor, Objective, Tensor | None], Tensor] | None = None,
) -> Tensor:
    """Return the mean objective of each window, float32 `[n]`, with gradients to `logits`.

    `logits` `[n, window_tokens, vocabulary]`; `tokens` int64 `[n, window_tokens]`; `teacher`: logits of the dense model
    of the same shape, None if `objective.kl` is 0. `each`: `window_objective`, or what it was compiled to.
    """
    each = each or window_objective
    windows = enumerate(zip(logits, tokens, strict=True))
    return torch.stack(
        [each(own, text, objective, None if teacher is None else teacher[i]) for i, (own, text) in windows]
    )


def window_objective(logits: Tensor, tokens: Tensor, objective: Objective, teacher: Tensor | None) -> Tensor:
    """Return the mean objective of one window, float32: logits `[window_tokens, vocabulary]`, tokens `[window_tokens]`.

    The last position, which has no target, is left out of both terms.
    """
    log_probs = F.log_softmax(logits[:-1].float(), dim=-1)
    loss = (1 - objective.kl) * F.nll_loss(log_probs, tokens[1:])
    if teacher is not None:
        dense = F.log_softmax(teacher[:-1].float(), dim=-1)
        loss = loss + objective.kl * F.kl_div(log_probs, dense, reduction="batchmean", log_target=True)
    return loss
