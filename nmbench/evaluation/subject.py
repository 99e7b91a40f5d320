"""The subjects of a metric: the pruned model on the test texts, and the dense model for comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from nmbench.data import begun, cut
from nmbench.errors import NMBenchError, NumericalFailure
from nmbench.evaluation.losses import batch_size, losses_in_parts, next_token_logits, window_losses
from nmbench.models.bundle import Bundle
from nmbench.models.dense_view import DenseView
from nmbench.spec import WITH_BOS

T = TypeVar("T")
InParts = Callable[[Callable[[Tensor], Tensor], Tensor, int, Callable[[int, int], None]], Tensor]


def key(dataset: str, window: int, bos: bool = False) -> str:
    """Return the key of cached losses: `wikitext2@2048`, or `wikitext2@2048+bos`."""
    return f"{dataset}@{window}{WITH_BOS if bos else ''}"


class Windows(NamedTuple):
    """Measured windows of a test text: int64 `[windows, window]`, or `[windows, 1 + window]` if `bos` is in front."""

    tokens: Tensor
    bos: bool


class Subject:
    """The model that a metric measures. `texts` maps a data set name to its test tokens int64 `[n]`.

    A metric may store its figure of each window in `per_window`: full name -> float64 `[windows]` on the CPU. The host
    keeps these with the losses and compares rows by them in pairs. `logit_bytes` sets the size of a batch by its
    float32 logits; the default depends on the device. `in_parts` measures windows, a batch of that size at a time.
    `bos`: the BOS token begins every window, whose targets stay the same.
    """

    def __init__(
        self,
        bundle: Bundle,
        texts: Mapping[str, Tensor],
        report: Callable[[int, int], None] = lambda done, total: None,
        logit_bytes: int | None = None,
        in_parts: InParts = losses_in_parts,
    ) -> None:
        self.bundle = bundle
        self.texts = texts
        self.cached: dict[str, Tensor] = {}
        self.windows: dict[str, Windows] = {}  # those of the cached losses
        self.per_window: dict[str, Tensor] = {}
        self._report = report
        self._logit_bytes = logit_bytes
        self._in_parts = in_parts
        self._made: dict[str, Any] = {}

    def losses(self, dataset: str, window: int, bos: bool = False) -> Tensor:
        """Return the losses of the windows of a test text, float64 `[windows]` on the CPU; computed once."""
        name = key(dataset, window, bos)
        if name not in self.cached:
            self.windows[name] = Windows(self.test_windows(dataset, window, bos), bos)
            self.cached[name] = self.measure(self.windows[name].tokens, name, bos)
        return self.cached[name]

    def test_windows(self, dataset: str, window: int, bos: bool = False) -> Tensor:
        """Return the windows of a test text: int64 `[windows, window]`, or `[windows, 1 + window]` with BOS in front.

        Raises `NMBenchError` for `bos` if the tokenizer has no BOS token.
        """
        windows = cut(self.texts[dataset], window, dataset)
        return begun(windows, self.bundle.tokenizer, key(dataset, window, bos)) if bos else windows

    def batches(self, dataset: str, window: int, bos: bool = False) -> Iterator[Tensor]:
        """Yield the windows of a test text in batches int64 `[batch, window]`, on the device of the model."""
        windows = self.test_windows(dataset, window, bos)
        parts = windows.split(batch_size(self.bundle.model, windows.shape[1], self._logit_bytes))
        for index, part in enumerate(parts):
            yield part.to(self.bundle.device)
            self._report(index + 1, len(parts))

    def logits(self, tokens: Tensor, bos: bool = False) -> Tensor:
        """Return the logits of a batch at all positions with a next token: `[batch, window - 1, vocabulary]`.

        They have the dtype of evaluation. Keep the logits of one batch at a time. `bos`: the batch was made with it.
        """
        return next_token_logits(self.bundle.model, tokens, bos)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Return the cached result of `make`, which is called once per `name`: work that several metrics share."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    @torch.no_grad()
    def measure(self, windows: Tensor, name: str, bos: bool = False) -> Tensor:
        """Return the losses of all windows. Raises `NumericalFailure` if a loss is NaN or infinite."""
        size = batch_size(self.bundle.model, windows.shape[1], self._logit_bytes)
        total = self._in_parts(lambda part: self._part(part, bos), windows, size, self._report).double()
        if not total.isfinite().all():
            raise NumericalFailure(
                f"the loss on {name} is NaN or infinite, first in window {int((~total.isfinite()).nonzero()[0])}."
            )
        return total

    def _part(self, windows: Tensor, bos: bool) -> Tensor:
        return window_losses(self.bundle.model, windows.to(self.bundle.device), bos=bos)


class DenseSubject:
    """The dense model, for metrics that compare a pruned model with it.

    While the dense row is measured, `live` computes losses on demand. Later `cached` holds the losses of that row, and
    `losses` raises `NMBenchError` for any others. `model` recomputes logits, and other results of a forward pass, batch
    by batch: the logits of a whole text would fill a disk.
    """

    def __init__(
        self, cached: Mapping[str, Tensor], live: Subject | None = None, model: DenseView | None = None
    ) -> None:
        self.cached = dict(cached)
        self.live = live
        self.model = model

    def logits(self, tokens: Tensor, bos: bool = False) -> Tensor:
        """Return the logits of the dense model, as `Subject.logits` does."""
        with self.shown() as model:
            return next_token_logits(model, tokens, bos)

    def shown(self) -> AbstractContextManager[nn.Module]:
        """Make forward passes of `subject.bundle.model` those of the dense model while the context is open.

        Raises `NMBenchError` if only losses of the dense model are available.
        """
        if self.model is None:
            raise NMBenchError("the dense model is not available here, only its losses.")
        return self.model.shown()

    def losses(self, dataset: str, window: int, bos: bool = False) -> Tensor:
        """Return the losses of the dense model. Raises `NMBenchError` if they were not measured."""
        name = key(dataset, window, bos)
        if self.live is not None:
            return self.live.losses(dataset, window, bos)
        if name not in self.cached:
            raise NMBenchError(f"the dense model was not measured on {name}.")
        return self.cached[name]
