"""Losses of the model as it stands, window by window; metrics are computed from these.

All losses are mean cross-entropies in nats over the `window - 1` targets of a window, computed in float32. Windows
never see each other, so the batch size changes nothing but speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from nmbench.data import cut
from nmbench.dense import DenseTwin
from nmbench.errors import NMBenchError, NumericalFailure
from nmbench.models import Bundle
from nmbench.sources import Metric

__all__ = ["DenseSubject", "Subject", "batch_size", "losses_in_parts", "window_losses"]

LOGIT_BYTES = 64 * 2**20  # a batch is as large as this allows for its float32 logits; more is slower on a CPU
GPU_LOGIT_BYTES = 2**30  # of a whole batch on a GPU, where small batches are slow
LARGE_VOCABULARY = 2**17  # assumed of a model that does not tell
T = TypeVar("T")


def window_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of each window in nats: int64 `[n, window]` -> float32 `[n]`.

    No more than `LOGIT_BYTES` of logits (one window at least) are there in float32. Never waits for the device.
    """
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]  # [n, window - 1, vocabulary]
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


def key(dataset: str, window: int) -> str:
    """How cached losses are named: `wikitext2@2048`."""
    return f"{dataset}@{window}"


class Subject:
    """The model that a metric measures. `texts` maps a data set name to its test tokens int64 `[n]`.

    `per_window` is for figures of every window under the full name of their metric, float64 `[windows]` on the CPU:
    they are kept with the losses, and rows are compared by them, paired.
    """

    def __init__(
        self,
        bundle: Bundle,
        texts: Mapping[str, Tensor],
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.bundle = bundle
        self.texts = texts
        self.cached: dict[str, Tensor] = {}
        self.per_window: dict[str, Tensor] = {}
        self._report = report
        self._made: dict[str, Any] = {}

    def losses(self, dataset: str, window: int) -> Tensor:
        """Per-window losses on the test text of a data set, float64 `[windows]` on the CPU; computed once."""
        name = key(dataset, window)
        if name not in self.cached:
            self.cached[name] = self.measure(cut(self.texts[dataset], window, dataset), name)
        return self.cached[name]

    def batches(self, dataset: str, window: int) -> Iterator[Tensor]:
        """The windows of a test text, as many at once as the model is shown: int64 `[batch, window]` on its device."""
        windows = cut(self.texts[dataset], window, dataset)
        parts = windows.split(batch_size(self.bundle.model, window))
        for index, part in enumerate(parts):
            yield part.to(self.bundle.device)
            self._report(index + 1, len(parts))

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits at all positions of a batch that have a next token: `[batch, window - 1, vocabulary]`, in the dtype of
        evaluation. No more than a batch of them should be kept.
        """
        return next_token_logits(self.bundle.model, tokens)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What `make` returns, made when first asked for under `name`: work that several metrics share."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    @torch.no_grad()
    def measure(self, windows: Tensor, name: str) -> Tensor:
        """Losses of all windows, batch by batch. Raises `NumericalFailure` if one is NaN or infinite."""
        size = batch_size(self.bundle.model, windows.shape[1])
        total = losses_in_parts(self._part, windows, size, self._report).double()
        if not total.isfinite().all():
            raise NumericalFailure(
                f"the loss on {name} is NaN or infinite, first in window {int((~total.isfinite()).nonzero()[0])}."
            )
        return total

    def _part(self, windows: Tensor) -> Tensor:
        return window_losses(self.bundle.model, windows.to(self.bundle.device))


@torch.no_grad()
def next_token_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits before every token but the first: int64 `[n, window]` -> `[n, window - 1, vocabulary]`."""
    return model(input_ids=tokens, use_cache=False).logits[:, :-1]


class DenseSubject:
    """The dense model, for metrics that compare.

    Its losses: while the dense model itself is measured (`live`) they are made as they are asked for; later only what
    was measured then is there, and `NMBenchError` is raised for the rest. Its logits, and whatever else a forward pass
    shows, are computed anew batch by batch (`model`): those of a whole text would fill a disk.
    """

    def __init__(
        self, cached: Mapping[str, Tensor], live: Subject | None = None, model: DenseTwin | None = None
    ) -> None:
        self.cached = dict(cached)
        self.live = live
        self.model = model

    def logits(self, tokens: Tensor) -> Tensor:
        """As `Subject.logits`, of the dense model."""
        with self.shown() as model:
            return next_token_logits(model, tokens)

    def shown(self) -> AbstractContextManager[nn.Module]:
        """A context in which forward passes of `subject.bundle.model` are those of the dense model, block by block."""
        if self.model is None:
            raise NMBenchError("the dense model is not at hand here; only its losses are.")
        return self.model.shown()

    def losses(self, dataset: str, window: int) -> Tensor:
        name = key(dataset, window)
        if self.live is not None:
            return self.live.losses(dataset, window)
        if name not in self.cached:
            raise NMBenchError(f"the dense model was not measured on {name}.")
        return self.cached[name]


def measure_all(metrics: Mapping[str, Metric], subject: Subject, dense: DenseSubject) -> dict[str, dict[str, Any]]:
    """Every metric's values, by full name."""
    values: dict[str, dict[str, Any]] = {}
    for metric in metrics.values():
        values.update({name: dict(value) for name, value in metric.measure(subject, dense).items()})
    return values
