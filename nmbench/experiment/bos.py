"""The doubt about windows without the BOS token, measured on a few windows of the dense model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from nmbench.data import adds_bos, begun, bos_of, cut
from nmbench.errors import NMBenchError
from nmbench.evaluation.losses import batch_size, losses_in_parts, window_losses
from nmbench.experiment.doubts import Doubt
from nmbench.experiment.tokenizer_checks import rows_of
from nmbench.models.bundle import Bundle
from nmbench.sources import Metric, WindowMetric
from nmbench.spec import WITH_BOS

FEW_WINDOWS = 8  # spread evenly over a text
CLEAR_NATS = 0.05  # a difference of the dense loss that tells what the model was trained with


def check_bos(bundle: Bundle, what: str) -> None:
    """Raise `NMBenchError`, naming `what` asks for BOS, if the tokenizer has none or the model has no such token."""
    bos, rows = bos_of(bundle.tokenizer), rows_of(bundle)
    if bos is None:
        raise NMBenchError(
            f"{what} asks for windows that begin with BOS, and the tokenizer of {bundle.ref} has no BOS token; leave "
            f"{WITH_BOS} out, and --bos always."
        )
    if rows is not None and not 0 <= bos < rows:
        raise NMBenchError(
            f"{what} asks for windows that begin with BOS, which is token {bos}, and {bundle.ref} embeds {rows} "
            f"tokens; give it the tokenizer it was trained with."
        )


def bos_doubts(
    bundle: Bundle, metrics: Mapping[str, Metric], texts: Mapping[str, Tensor], context: int | None
) -> tuple[Doubt, ...]:
    """Return a doubt for each text whose windows should begin with BOS, and do not in any metric.

    The dense loss falls clearly with BOS; or the tokenizer adds BOS to a text by itself, and the loss does not rise
    clearly. The loss is measured on a few windows.
    """
    bos, rows = bos_of(bundle.tokenizer), rows_of(bundle)
    if bos is None or (rows is not None and not 0 <= bos < rows):
        return ()
    added = adds_bos(bundle.tokenizer)
    found = []
    for metric in without_bos(metrics):
        window = min(metric.window, context - 1) if context else metric.window
        if window < 2:
            continue
        name = f"{metric.word}:{metric.dataset}@{window}{WITH_BOS}"
        fall = fall_by_bos(bundle, cut(texts[metric.dataset], window, metric.dataset))
        if fall.nats > CLEAR_NATS or (added and fall.nats >= -CLEAR_NATS):
            found.append(Doubt("BOS", sentence(metric, fall, added, name)))
    return tuple(found)


def without_bos(metrics: Mapping[str, Metric]) -> Iterator[WindowMetric]:
    """Yield one metric of every text and window length that no metric measures with BOS."""
    able = [metric for metric in metrics.values() if isinstance(metric, WindowMetric) and metric.takes_bos]
    seen = {metric.without_bos for metric in able if metric.bos}
    for metric in able:
        if metric.without_bos not in seen:
            seen.add(metric.without_bos)
            yield metric


class Fall(NamedTuple):
    """By how many nats per token the dense loss falls where BOS begins a window: the mean over some windows."""

    nats: float
    windows: int


@torch.no_grad()
def fall_by_bos(bundle: Bundle, windows: Tensor) -> Fall:
    """Return the fall over a few of `windows` `[n, window]`, in batches; the targets are the same with BOS."""
    few = windows[torch.linspace(0, len(windows) - 1, min(FEW_WINDOWS, len(windows))).long()]
    few = few[few[:, 0] != bos_of(bundle.tokenizer)]  # the beginning of the text may begin with BOS as it is
    if not len(few):
        return Fall(0.0, 0)
    before = mean_loss(bundle, few, bos=False)
    return Fall(before - mean_loss(bundle, begun(few, bundle.tokenizer, "BOS"), bos=True), len(few))


def mean_loss(bundle: Bundle, windows: Tensor, bos: bool) -> float:
    """Return the mean loss in nats of windows `[n, window]`; with `bos`, they begin with it."""
    size = batch_size(bundle.model, windows.shape[1])
    losses = losses_in_parts(lambda part: window_losses(bundle.model, part.to(bundle.device), bos=bos), windows, size)
    return float(losses.double().mean())


def sentence(metric: WindowMetric, fall: Fall, added: bool, name: str) -> str:
    """Return the text of the doubt about a metric; `name` is the metric to measure."""
    why = "the tokenizer begins every text with BOS; " if added else ""
    change = f"{'falls' if fall.nats >= 0 else 'rises'} by {abs(fall.nats):.3f} nats"
    return (
        f"no BOS begins the windows of {metric.full_name}; {why}with it the dense loss {change} (mean of "
        f"{fall.windows} windows); measure {name}."
    )
