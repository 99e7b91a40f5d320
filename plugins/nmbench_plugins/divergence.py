"""The distance of next-token distributions, pruned from dense model: `kl:` and `top1:<data set>@<window>`.

Windows as in `ppl:`, with `+bos` too. For every position t of a window that has a next token in it, with p the
distribution of the dense model and q the distribution of the pruned model, both softmaxes of float32 logits:

    kl    KL(p || q) = sum_v p(v) (log p(v) - log q(v)), mean over all positions, in nats per token
    top1  share of positions at which argmax p = argmax q

Neither metric uses the next token of the text: both compare the predictions of the pruned model with those of the dense
model. One pass over the text serves both metrics; the dense logits are computed again batch by batch, never stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import nmbench

if TYPE_CHECKING:
    from torch import Tensor

PART_BYTES = 32 * 2**20  # of float32 logits at once


@dataclass(frozen=True)
class Divergence(nmbench.WindowMetric):
    """The shared base of both metrics: one pass over the text, and figures by window."""

    takes_bos: ClassVar[bool] = True
    column: ClassVar[int]
    unit: ClassVar[str]
    lower_is_better: ClassVar[bool]

    def measure(self, subject: nmbench.Subject, dense: nmbench.DenseSubject) -> Mapping[str, nmbench.Value]:
        found = subject.once(f"divergence of {self.argument}", lambda: self.divergences(subject, dense))
        values = found[:, self.column]  # [windows]
        subject.per_window[self.full_name] = values
        stderr = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None
        mean = float(values.mean())
        return {self.full_name: nmbench.Value(mean, len(values), stderr, self.lower_is_better, self.unit)}

    def divergences(self, subject: nmbench.Subject, dense: nmbench.DenseSubject) -> Tensor:
        """Return KL and agreement, each the mean over a window: float64 `[windows, 2]` on the CPU.

        Raises `NumericalFailure` if a logit is NaN or infinite.
        """
        import torch

        batches = subject.batches(self.dataset, self.window, self.bos)
        logits = ((dense.logits(tokens, self.bos), subject.logits(tokens, self.bos)) for tokens in batches)
        found = torch.cat([compared(*both) for both in logits])
        if not found.isfinite().all():
            first = int((~found.isfinite().all(dim=1)).nonzero()[0])
            raise nmbench.NumericalFailure(f"logits on {self.argument} are NaN or infinite, first in window {first}.")
        return found


@dataclass(frozen=True)
class Kl(Divergence):
    """Mean KL divergence of the pruned model's next-token distribution from the dense model's, nats per token."""

    word: ClassVar[str] = "kl"
    column: ClassVar[int] = 0
    unit: ClassVar[str] = "nats/token"
    lower_is_better: ClassVar[bool] = True


@dataclass(frozen=True)
class Top1(Divergence):
    """Share of positions at which the pruned and the dense model have the same most likely token."""

    word: ClassVar[str] = "top1"
    column: ClassVar[int] = 1
    unit: ClassVar[str] = "share of tokens"
    lower_is_better: ClassVar[bool] = False


def compared(dense: Tensor, pruned: Tensor) -> Tensor:
    """Return means over each window, float64 `[n, 2]` on the CPU, from logits `[n, window - 1, vocabulary]`."""
    import torch

    size = max(1, PART_BYTES // (4 * dense.shape[-1]))
    means = []
    for p, q in zip(dense, pruned, strict=True):  # one window at a time: all windows at once would be a copy
        parts = zip(p.split(size), q.split(size), strict=True)
        tokens = torch.cat([of_tokens(some.float(), others.float()) for some, others in parts])  # [window - 1, 2]
        means.append(tokens.double().mean(dim=0))
    return torch.stack(means).cpu()


def of_tokens(dense: Tensor, pruned: Tensor) -> Tensor:
    """Return KL in nats and agreement, 1 or 0, of every token `[tokens, 2]`, from float32 `[tokens, vocabulary]`."""
    import torch
    import torch.nn.functional as F

    log_p, log_q = F.log_softmax(dense, dim=-1), F.log_softmax(pruned, dim=-1)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
    agree = dense.argmax(dim=-1) == pruned.argmax(dim=-1)
    return torch.stack([kl, agree.to(kl.dtype)], dim=-1)


@nmbench.hookimpl
def nmbench_register_metrics(register: nmbench.Register) -> None:
    register("kl", Kl)
    register("top1", Top1)
