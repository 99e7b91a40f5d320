"""The task of a mask learner: the model, tokens, the masks of its start, and access to the live weights.

The host counts tokens, undoes every change of the weights, checks reported masks, and stores checkpoints together with
the counters, so that a learner that is killed resumes from its last checkpoint with its whole cost.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nmbench.errors import NMBenchError
from nmbench.evaluation.losses import batch_size, losses_in_parts, window_losses
from nmbench.experiment.stopping import stopping
from nmbench.methods import Pruned, PrunedModel
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import ByLayer, DenseWeights
from nmbench.pattern import Pattern
from nmbench.pruning.block_masks import BlockMasks, LearnBlock
from nmbench.pruning.blocks import Blocks
from nmbench.pruning.live_weights import LiveWeights as LiveWeights
from nmbench.pruning.shared_work import SharedWork
from nmbench.pruning.training import Training
from nmbench.pruning.unique_tokens import UniqueTokens, cut_windows
from nmbench.runtime.cost import Cost, Spent
from nmbench.verification.strict import check_masks

PROBE_TOKENS = 24  # that `LiveWeights.provided` is proven on
USED, COUNTERS = "nmbench.dealt ", "nmbench.counters"  # names that the host adds to a checkpoint
CURVE_POINTS = 1000  # of a record; of a longer curve every second point is kept

OnReport = Callable[[str, int, int | None, Mapping[str, float]], None]  # stage, done, total, figures


class CheckpointStore(Protocol):
    """Durable storage of one job: tensors and plain JSON values by name; a write is atomic."""

    def save(self, state: Mapping[str, Any]) -> None: ...

    def load(self) -> dict[str, Any] | None: ...


class Batch(NamedTuple):
    """A minibatch: `chosen` int64 `[size]`, indices of its windows; `tokens` int64 `[size, window_tokens]`."""

    chosen: Tensor
    tokens: Tensor


class LearnTask(SharedWork):
    """The task of one mask learner. The tensors of `dense` and `initial` are read-only and in host memory.

    `model`; `layers`: name -> shape `[out, in]`; `pattern`: name -> `Pattern`; `initial`: name -> bool mask
    of the start; `dense`: name -> dense weight; `pool`: int64 `[windows, window_tokens]` to learn from; `generator`:
    the only source of randomness, on the device of the model; `checkpoints`: storage of the learner's state; `notes`:
    JSON values for the record.
    """

    def __init__(
        self,
        bundle: Bundle,
        weights: DenseWeights,
        pattern: Mapping[str, Pattern],
        initial: Mapping[str, Tensor],
        pool: Tensor,
        selection: Tensor,
        seed: int,
        checkpoints: CheckpointStore,
        who: str,
        on_report: OnReport = lambda stage, done, total, values: None,
    ) -> None:
        super().__init__()
        self.bundle = bundle
        self.model: nn.Module = bundle.model
        self.layers = {name: layer.shape for name, layer in bundle.layers.items()}
        self.pattern = dict(pattern)
        self.initial = {name: mask.cpu() for name, mask in initial.items()}
        self.dense: Mapping[str, Tensor] = ByLayer(weights)
        self.pool = pool.to(bundle.device)
        self.generator = torch.Generator(bundle.device).manual_seed(seed)
        self.who = who
        self.cost = Cost()
        self.notes: dict[str, Any] = {}  # JSON values that go into the record
        self.experts: Mapping[str, Any] = {}  # as `PrunedModel.experts`
        self.curve: list[dict[str, float | None]] = []
        self.checkpoints = CountingStore(self, checkpoints)
        self._selection = selection.to(bundle.device)
        self._weights = weights
        self._on_report = on_report
        self._used = UniqueTokens(self.pool)

    @property
    def selection(self) -> Tensor:
        """Held-out windows int64 `[n, window_tokens]` to choose masks by; their tokens count from the first read on."""
        self.cost.selection_tokens = self._selection.numel()
        return self._selection

    def windows(self, window_tokens: int | None = None) -> Tensor:
        """Return the pool as windows int64 `[n, window_tokens]`; a shorter length cuts every pool window into pieces.

        Raises `NMBenchError` if `window_tokens` is more than the length of a pool window.
        """
        length = self.pool.shape[1]
        if window_tokens is None:
            return self.pool
        if window_tokens > length:
            raise NMBenchError(
                f"{self.who} asks for windows of {window_tokens} tokens, the pool has {length}; raise --window-tokens."
            )
        return cut_windows(self.pool, window_tokens)

    def batches(
        self, size: int, generator: torch.Generator | None = None, windows: Tensor | None = None, start: int = 0
    ) -> Iterator[Batch]:
        """Yield minibatches of the pool, or of `windows` int64 `[n, window_tokens]`, without end.

        With a generator every minibatch is drawn anew, without repeats inside the minibatch, so that the state of the
        generator is enough to resume. Without a generator, minibatches come in fixed order from minibatch `start` on.
        """
        windows = self.pool if windows is None else windows
        count = len(windows)
        size = min(size, count)
        marks = self._used.marks(windows)
        while True:
            if generator is None:
                index = (torch.arange(size, device=windows.device) + start * size) % count
            else:
                index = torch.randperm(count, generator=generator, device=windows.device)[:size]
            marks[index] = True
            start += 1
            yield Batch(index, windows[index])

    @contextlib.contextmanager
    def live_weights(self) -> Iterator[LiveWeights]:
        """Open the live weights, which are dense; every change of the weights is undone when the context closes."""
        try:
            stored = {name: self._weights.stored(layer) for name, layer in self.bundle.layers.items()}
            yield LiveWeights(self.bundle, stored, self.pool[:1, :PROBE_TOKENS], self.count_forward)
        finally:
            stopping.leave()
            self._weights.restore()

    @contextlib.contextmanager
    def masked_weights(self) -> Iterator[LiveWeights]:
        """Open the live weights, masked by `initial`; the dense weights are restored when the context closes."""
        with self.live_weights() as live:
            live.apply(self.initial)
            yield live

    @contextlib.contextmanager
    def gradients(self) -> Iterator[Training]:
        """Open the live weights, masked by `initial`, with gradients; dense weights come back when the context closes.

        `Training.backward` computes the gradients of an `Objective`, with the dense model as teacher if it needs one.
        """
        try:
            with self.masked_weights():
                yield Training(self, self._weights)
        finally:
            self.bundle.model.zero_grad()  # gradients are as large as the model

    def learn_blocks(
        self, learn: LearnBlock, windows: Tensor | None = None, minibatch: int = 8, dense_path: bool = True
    ) -> dict[str, Tensor]:
        """Return masks of all layers, in host memory, learnt one decoder block after the other on dense weights.

        `learn` gets a `BlockTask`, and returns layer name -> bool mask `[out, in]`; a layer that is left out keeps the
        mask of the start, and later blocks see the masks of earlier ones. `windows` int64 `[n, window_tokens]`, by
        default the pool, go through the blocks in batches of `minibatch`; with `dense_path` the dense model runs beside
        them. Only the block at work need be on the device. Every finished block is a checkpoint, so a learner calls
        this once and keeps no checkpoints of its own. Raises `NotStrict` for masks that are not strict.
        """
        windows = self.pool if windows is None else windows
        self._used.marks(windows)[: len(windows)] = True
        start = PrunedModel({name: Pruned(mask) for name, mask in self.initial.items()})
        seed, count = self.generator.initial_seed(), len(self.bundle.blocks)

        def progress(block: int, done: int, total: int) -> None:
            self.progress(f"block {block + 1} of {count}", done, total)

        blocks = Blocks(self.bundle, start, self.pattern, windows, minibatch, dense_path, seed, progress)
        try:
            return BlockMasks(self, blocks, learn).result()
        finally:
            self._weights.put_back()

    def loss(self, tokens: Tensor) -> Tensor:
        """Return the mean cross-entropy of each window in nats, float32 `[size]`, under the current weights.

        The losses have gradients if the caller enabled gradients. Forward and backward tokens are counted.
        """
        self.count_forward(tokens.numel())
        if not torch.is_grad_enabled():
            return losses_in_parts(
                lambda part: window_losses(self.model, part), tokens, batch_size(self.model, tokens.shape[1])
            )
        losses = window_losses(self.model, tokens)
        if losses.requires_grad:
            losses.register_hook(lambda gradient: self._count_backward(tokens.numel()))
        return losses

    def count_forward(self, tokens: int) -> None:
        """Count tokens that a learner ran through the model without `loss`."""
        self.cost.forward_tokens += tokens

    def report(
        self, step: int, *, total: int | None = None, masks: Mapping[str, Tensor] | None = None, **values: float
    ) -> None:
        """Report a learning step, of `total`, and its figures to the user; the record keeps them as a curve.

        Raises `NotStrict` if `masks` are not strict.
        """
        if masks is not None:
            check_masks(masks, self.pattern, self.layers, self.who)
            self.check_same(masks)
        if values:
            self.curve.append({"step": step, **{name: finite(value) for name, value in values.items()}})
        if len(self.curve) > CURVE_POINTS:
            self.curve = self.curve[::2]
        self._on_report("learn", step, total, values)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Report the progress of a stage besides learning, such as the measurement of a reference."""
        self._on_report(stage, done, total, {})

    def settle(self) -> Cost:
        """Return the cost so far, including the count of distinct tokens that `batches` yielded."""
        self.cost.unique_tokens = self._used.count()
        return self.cost

    def _count_backward(self, tokens: int) -> None:
        self.cost.backward_tokens += tokens


def finite(value: float) -> float | None:
    """A figure as JSON holds it: None for NaN and infinity."""
    return float(value) if math.isfinite(value) else None


class CountingStore:
    """Checkpoints that also hold the counters of the task, so that a resumed job reports its whole cost."""

    def __init__(self, task: LearnTask, store: CheckpointStore) -> None:
        self.task = task
        self.store = store
        self.earlier = Spent()
        self._start = Spent.now()

    @property
    def ending(self) -> bool:
        """True if the process was asked to end: a learner that asks after every step saves then, and ends there."""
        return stopping.due()

    def due(self, step: int, every: int) -> bool:
        """Return True if a learner should save after `step`: at every `every`th, and if the process should end."""
        return self.ending or step % every == 0

    def save(self, state: Mapping[str, Any]) -> None:
        """Store tensors and JSON values; the checkpoint is durable when this returns.

        Raises Ctrl-C or SIGTERM if a signal waits for the checkpoint. Of several ranks rank 0 stores it.
        """
        if not self.task.ranks.leads:
            return
        spent = self.earlier + Spent.now().since(self._start)
        device = self.task.bundle.device.type
        counters = {"cost": asdict(self.task.settle()), "device": device, **asdict(spent)}
        counters["curve"] = self.task.curve
        used = {f"{USED}{key}": marks for key, marks in self.task._used.state().items()}
        self.store.save({**state, **used, COUNTERS: counters})
        stopping.end()

    def load(self) -> dict[str, Any] | None:
        """Return the state stored last, or None if there is no checkpoint.

        Raises `NMBenchError` for a checkpoint of another kind of device, because random numbers differ between kinds.
        """
        state = self.store.load()
        self.task.check_same_checkpoint(state)
        if state is None:
            return None
        counters = state.pop(COUNTERS)
        if counters["device"] != self.task.bundle.device.type:
            raise NMBenchError(
                f"{self.task.who} has a checkpoint made on {counters['device']}; go on with --device "
                f"{counters['device']}, or start anew with another --out."
            )
        for name, value in counters["cost"].items():
            setattr(self.task.cost, name, value)
        self.earlier = Spent(counters["seconds"], counters.get("cpu_seconds"))
        self.task.curve = list(counters["curve"])
        stored = [name for name in state if name.startswith(USED)]
        self.task._used.restore({name.removeprefix(USED): state.pop(name) for name in stored})
        return state
