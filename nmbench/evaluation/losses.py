"""Losses of the live model by window, from which metrics are computed.

All losses are mean cross-entropies in nats over the `window - 1` targets of a window, computed in float32. Windows do
not attend to each other, so the batch size affects only the speed. A BOS token in front of a window is no part of it:
the targets stay the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from nmbench.models.forward import logits_of, run_model

LOGIT_BYTES = 64 * 2**20  # of float32 logits at once, and of those of a batch on a CPU, where more is slower
GPU_LOGIT_BYTES = 2**30  # of the float32 logits of a batch on a GPU, where small batches are slow
LARGE_VOCABULARY = 2**17  # assumed of a model without output embeddings


def window_losses(model: nn.Module, tokens: Tensor, logit_bytes: int = LOGIT_BYTES, bos: bool = False) -> Tensor:
    """Return the mean cross-entropy of each window in nats: int64 `[n, window]` -> float32 `[n]`.

    With `bos`, `tokens` `[n, 1 + window]` begin with a BOS token. At most `logit_bytes` of logits, but at least those
    of one token, exist in float32 at a time. Never blocks on the device.
    """
    logits = logits_of(run_model(model, tokens))[:, bos:-1]  # [n, window - 1, vocabulary]
    size = max(1, logit_bytes // (4 * logits[:1].numel()))  # windows
    parts = zip(logits.split(size), tokens[:, 1 + bos :].split(size), strict=True)
    losses = [token_losses(part.flatten(0, 1), to.flatten(), logit_bytes) for part, to in parts]
    return torch.cat(losses).view(len(tokens), -1).mean(dim=1)


def token_losses(logits: Tensor, targets: Tensor, logit_bytes: int) -> Tensor:
    """Return the cross-entropy in nats of each token, float32 `[n]`, from logits `[n, vocabulary]`, part by part."""
    size = max(1, logit_bytes // (4 * logits.shape[1]))  # tokens
    parts = zip(logits.split(size), targets.split(size), strict=True)
    return torch.cat([F.cross_entropy(part.float(), to, reduction="none") for part, to in parts])


def losses_in_parts(
    measure: Callable[[Tensor], Tensor],
    windows: Tensor,
    size: int,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Return the losses float32 `[n]` of windows `[n, window]`, `size` windows at a time.

    `report(parts done, parts)` is called after each part. The result is allocated before the first part: small tensors
    allocated between large ones that are freed would pin the heap of the C library, which then grows by a batch of
    logits with each part.
    """
    losses = torch.empty(len(windows), device=windows.device)
    parts = windows.split(size)
    for index, (part, slot) in enumerate(zip(parts, losses.split(size), strict=True)):
        slot.copy_(measure(part))
        report(index + 1, len(parts))
    return losses


def batch_size(model: nn.Module, window_tokens: int, logit_bytes: int | None = None) -> int:
    """Return the number of windows in a batch: its float32 logits take `logit_bytes`, which default by device."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    vocabulary = LARGE_VOCABULARY if head is None else head.weight.shape[0]
    if logit_bytes is None:
        logit_bytes = LOGIT_BYTES if next(model.parameters()).device.type == "cpu" else GPU_LOGIT_BYTES
    return max(1, logit_bytes // (4 * vocabulary * window_tokens))


@torch.no_grad()
def next_token_logits(model: nn.Module, tokens: Tensor, bos: bool = False) -> Tensor:
    """Return the logits of every token but the first: int64 `[n, window]` -> `[n, window - 1, vocabulary]`.

    With `bos`, `tokens` `[n, 1 + window]` begin with a BOS token.
    """
    return all_logits(model, tokens)[:, bos:-1]


def all_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the logits at every token, int64 `[n, window]` -> `[n, window, vocabulary]`, with gradients if enabled."""
    return logits_of(run_model(model, tokens))
