"""Losses of the model as it stands, window by window; metrics are computed from these.

All losses are mean cross-entropies in nats over the `window - 1` targets of a window, computed in float32. Windows
never see each other, so the batch size changes nothing but speed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from nmbench.models.forward import logits_of, run_model

LOGIT_BYTES = 64 * 2**20  # a batch is as large as this allows for its float32 logits; more is slower on a CPU


GPU_LOGIT_BYTES = 2**30  # of a whole batch on a GPU, where small batches are slow


LARGE_VOCABULARY = 2**17  # assumed of a model that does not tell


def window_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of each window in nats: int64 `[n, window]` -> float32 `[n]`.

    No more than `LOGIT_BYTES` of logits (one window at least) are there in float32. Never waits for the device.
    """
    logits = logits_of(run_model(model, tokens))[:, :-1]  # [n, window - 1, vocabulary]
    size = max(1, LOGIT_BYTES // (4 * logits[:1].numel()))
    parts = zip(logits.split(size), tokens[:, 1:].split(size), strict=True)
    losses = [F.cross_entropy(part.flatten(0, 1).float(), to.flatten(), reduction="none") for part, to in parts]
    return torch.cat(losses).view(len(tokens), -1).mean(dim=1)


def losses_in_parts(
    measure: Callable[[Tensor], Tensor],
    windows: Tensor,
    size: int,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Losses float32 `[n]` of windows `[n, window]`, measured `size` windows at a time; `report` is told of each part.

    The result is there before the first part: small tensors kept between large ones that come and go would pin the
    heap of the C library, which then grows by the size of a batch of logits every time.
    """
    losses = torch.empty(len(windows), device=windows.device)
    parts = windows.split(size)
    for index, (part, slot) in enumerate(zip(parts, losses.split(size), strict=True)):
        slot.copy_(measure(part))
        report(index + 1, len(parts))
    return losses


def batch_size(model: nn.Module, window_tokens: int) -> int:
    """How many windows the model is shown at once."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    vocabulary = LARGE_VOCABULARY if head is None else head.weight.shape[0]
    room = LOGIT_BYTES if next(model.parameters()).device.type == "cpu" else GPU_LOGIT_BYTES
    return max(1, room // (4 * vocabulary * window_tokens))


@torch.no_grad()
def next_token_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits before every token but the first: int64 `[n, window]` -> `[n, window - 1, vocabulary]`."""
    return logits_of(run_model(model, tokens))[:, :-1]
