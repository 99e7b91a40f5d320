"""What a metric measures: the pruned model on the test texts, and the dense model beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nmbench.data import cut
from nmbench.errors import NMBenchError, NumericalFailure
from nmbench.evaluation.losses import batch_size, losses_in_parts, next_token_logits, window_losses
from nmbench.models.bundle import Bundle
from nmbench.models.dense_view import DenseView

T = TypeVar("T")


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


class DenseSubject:
    """The dense model, for metrics that compare.

    Its losses: while the dense model itself is measured (`live`) they are made as they are asked for; later only what
    was measured then is there, and `NMBenchError` is raised for the rest. Its logits, and whatever else a forward pass
    shows, are computed anew batch by batch (`model`): those of a whole text would fill a disk.
    """

    def __init__(
        self, cached: Mapping[str, Tensor], live: Subject | None = None, model: DenseView | None = None
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
