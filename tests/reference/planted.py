"""Tasks to learn the masks of the planted model, and looks into an engine at work on them."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.pattern import Pattern
from nmbench.pruning.learning import CheckpointStore, LearnTask
from nmbench.pruning.live_weights import LiveWeights
from nmbench.results.files import MemoryCheckpoints
from nmbench.testing.planted import LENGTH as LENGTH
from nmbench.testing.planted import VOCABULARY, cycles, planted_bundle, strongest, weakest
from nmbench.testing.planted import Planted as Planted
from nmbench_plugins.maskpro.engines import Engine
from nmbench_plugins.maskpro.engines.logits import Logits

TWO_FOUR, FOUR_EIGHT = Pattern(2, 4), Pattern(4, 8)


@functools.cache
def planted() -> tuple[Bundle, DenseWeights]:
    bundle = planted_bundle()
    return bundle, DenseWeights(bundle)


def make(
    pool: Tensor | None = None,
    selection: Tensor | None = None,
    store: CheckpointStore | None = None,
    patterns: tuple[Pattern, Pattern] = (TWO_FOUR, TWO_FOUR),
    seed: int = 0,
    on_report: Any = lambda *event: None,
    from_best: bool = False,
) -> LearnTask:
    """A learning task on the planted model, from the worst masks or the best ones."""
    bundle, dense = planted()
    by_layer = dict(zip(bundle.layers, patterns, strict=True))
    pool = cycles(32) if pool is None else pool
    selection = cycles(16) if selection is None else selection
    store = store or MemoryCheckpoints()
    initial = strongest(bundle, by_layer) if from_best else weakest(bundle, by_layer)
    return LearnTask(bundle, dense, by_layer, initial, pool, selection, seed, store, "acme", on_report)


@contextlib.contextmanager
def working(engine: Callable[[LearnTask, LiveWeights], Engine], **options: Any) -> Iterator[Engine]:
    """An engine at work on the planted model, whose dense weights are there again afterwards."""
    task = make(**options)
    with torch.no_grad(), task.live_weights() as live:
        yield engine(task, live)
    assert planted()[0].digest() == planted()[1].digest


def logits_of(engine: Engine) -> dict[str, Tensor]:
    """The logits of an engine by layer, [out, in]."""
    saved = engine.to_save()
    if engine.name == "streamed":
        return {name: saved[f"logits {name}"].clone() for name in engine.task.layers}
    flat = {p: logits.contiguous() for p, logits in engine.logits.flat.items()}
    return {n: logits.clone() for n, logits in engine.logits._drawn(flat).by_layer.items()}


def loss_of(task: LearnTask, masks: Mapping[str, Tensor], windows: Tensor) -> float:
    """Mean cross-entropy of the planted model under `masks`, float64, written out."""
    hidden = F.one_hot(windows, VOCABULARY).double()
    for name in task.layers:
        hidden = hidden @ (task.dense[name].double() * masks[name]).t()
    return float(F.cross_entropy(hidden[:, :-1].reshape(-1, VOCABULARY), windows[:, 1:].reshape(-1)))


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def record_draws(monkeypatch: Any) -> list[dict[str, Tensor]]:
    """A list that every mask drawn by `Logits` from now on is added to, bool [out, in] by layer."""
    draws: list[dict[str, Tensor]] = []
    draw = Logits.draw

    def remembering(*args: Any) -> Any:
        drawn = draw(*args)
        draws.append({name: mask.clone() for name, mask in drawn.by_layer.items()})
        return drawn

    monkeypatch.setattr(Logits, "draw", remembering)
    return draws
