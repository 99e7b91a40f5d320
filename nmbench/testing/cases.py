"""Inputs of the checks: one layer, or a model with a planted answer. Equal fields make equal numbers.

The `repr` of a case is the line of Python that makes the case again, so that a failed call can be repeated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from nmbench.methods.masks import LayerStats, MaskLearner, Method, Pruned, PrunedModel, Refiner, Scorer, Solver, Stat
from nmbench.methods.repairs import BlockRepair, LayerRepair, WeightLearner
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.pattern import Pattern
from nmbench.pruning.block_parts import BlockTask
from nmbench.pruning.blocks import Blocks
from nmbench.pruning.learning import CheckpointStore, LearnTask
from nmbench.pruning.one_shot import call
from nmbench.pruning.repairing import call_repair
from nmbench.pruning.weights_task import WeightTask
from nmbench.results.files import MemoryCheckpoints
from nmbench.testing.planted import LENGTH, VOCABULARY, cycles, planted_bundle, strongest, weakest
from nmbench.testing.values import statistics, values

INPUTS = ("plain", "correlated", "dead channel", "all zero")
WINDOWS, WINDOW_TOKENS = 4, 32
SHRUNK = 0.5  # of the dense weights: the weights of a planted start, which a repair can improve
WHOLE = VOCABULARY + 2  # tokens of windows that hold every step of the cycle, so that all have about the same loss


class ShortRepr:
    """A `repr` for dataclasses with only those fields that differ from their defaults, as Python."""

    def __repr__(self) -> str:
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in changed.items())})"


@dataclass(frozen=True, repr=False)
class LayerCase(ShortRepr):
    """One layer to prune: a weight `[rows, groups * M]` of one `kind` of values, and `inputs` of one of `INPUTS`.

    With `shifted`, the inputs differ from those in the dense model; `drift` and `lag` are the statistics of that shift.
    """

    pattern: str = "2:4"
    kind: str = "normal"
    rows: int = 4
    groups: int = 4
    seed: int = 0
    dtype: str = "float32"
    inputs: str = "plain"
    shifted: bool = True
    device: str = "cpu"

    @property
    def shape(self) -> tuple[int, int]:
        return (self.rows, self.groups * self.nm.group)

    @property
    def nm(self) -> Pattern:
        """The pattern, parsed."""
        return Pattern.parse(self.pattern)

    def weight(self) -> Tensor:
        """The weight `[out, in]` in `dtype`."""
        return values(self.kind, self.shape, self.seed).to(self.device, getattr(torch, self.dtype))

    def tokens(self) -> Tensor:
        """The inputs X of the layer, float32 `[tokens, in]`."""
        x = values("normal", (WINDOWS * WINDOW_TOKENS, self.shape[1]), self.seed + 1)
        if self.inputs == "correlated":
            x = x + x[:, :1] + x.roll(1, dims=1)
        if self.inputs == "dead channel":
            x[:, self.seed % self.shape[1]] = 0.0
        return torch.zeros_like(x) if self.inputs == "all zero" else x

    def stats(self, needs: Stat) -> LayerStats:
        """The statistics in `needs`; all others are None."""
        if needs is Stat.NONE:
            return LayerStats(windows=0, tokens=0)
        x = self.tokens()
        shift = 0.1 * float(self.shifted)
        drift = shift * values("normal", tuple(x.shape), self.seed + 2)  # [tokens, in]
        lag = shift * values("normal", (len(x), self.rows), self.seed + 3)  # [tokens, out]
        full = statistics(x, WINDOWS)
        made = {
            "input_norm": full.input_norm if Stat.INPUT_NORM in needs else None,
            "gram": full.gram if Stat.GRAM in needs else None,
            "drift": 2 / WINDOWS * drift.T @ x if Stat.DRIFT in needs else None,  # [in, in]
            "lag": 2 / WINDOWS * lag.T @ x if Stat.LAG in needs else None,  # [out, in]
        }
        on_device = {name: value if value is None else value.to(self.device) for name, value in made.items()}
        return LayerStats(WINDOWS, len(x), **on_device)

    def mask(self) -> Tensor:
        """A strict mask to refine or to repair, bool `[out, in]`, which keeps the largest weights."""
        return self.nm.top(self.weight().float().abs())

    def start(self) -> Pruned:
        """The start of a repair: the mask, and the dense weights under it."""
        mask = self.mask()
        return Pruned(mask, self.weight().masked_fill(~mask, 0.0))

    def run(self, method: Method) -> Any:
        """The result of a method for this layer, called as the host calls it: scores, or a `Pruned`."""
        if isinstance(method, LayerRepair):
            return call_repair(method, self.weight(), self.stats(method.needs), self.start(), self.nm)
        assert isinstance(method, (Scorer, Solver, Refiner))
        return call(method, self.weight(), self.stats(method.needs), self.nm, self.mask())


@dataclass(frozen=True, repr=False)
class LearnCase(ShortRepr):
    """A learning task on the planted model (`nmbench.testing.planted`), which starts from the worst masks.

    A repair starts from the best masks instead, with weights that are half of the dense ones. The model has two layers;
    `second` is the pattern of the second layer, "" for that of the first. `streamed`: its blocks are offloaded to the
    host, as those of a model larger than the device. With `turn`, losses on selection windows that
    fall below `turn` nats rise again, as those of a learner that overfits: the best masks come before the last ones.
    """

    pattern: str = "2:4"
    second: str = ""
    seed: int = 0
    device: str = "cpu"
    turn: float = 0.0
    streamed: bool = False

    def patterns(self, names: Any) -> dict[str, Pattern]:
        """The pattern of each layer: layer name -> pattern."""
        first = Pattern.parse(self.pattern)
        return {name: Pattern.parse(self.second) if self.second and i else first for i, name in enumerate(names)}

    def bundle(self) -> Bundle:
        """A fresh model."""
        bundle = planted_bundle()
        if self.streamed:
            bundle.stream(torch.device(self.device))
        else:
            bundle.model.to(self.device)
        return bundle

    def start(self, bundle: Bundle) -> PrunedModel:
        """The start of a repair: the best masks, and weights that are half of the dense ones."""
        masks = strongest(bundle, self.patterns(bundle.layers))
        halves = {name: SHRUNK * layer.read() for name, layer in bundle.layers.items()}
        return PrunedModel({n: Pruned(mask, halves[n].masked_fill(~mask, 0.0)) for n, mask in masks.items()})

    def task(self, store: CheckpointStore | None = None, who: str = "the learner") -> RecordingTask:
        """A fresh task of a mask learner on a fresh model."""
        bundle = self.bundle()
        task = RecordingTask(*self._given(bundle, weakest(bundle, self.patterns(bundle.layers)), store, who))
        task.turn = self.turn
        return task

    def weight_task(self, store: CheckpointStore | None = None, who: str = "the learner") -> RecordingWeightTask:
        """A fresh task of a weight learner on a fresh model."""
        bundle = self.bundle()
        start = self.start(bundle)
        return RecordingWeightTask(*self._given(bundle, start.masks, store, who), start=start)

    def blocks(self, method: BlockRepair) -> Blocks:
        """The blocks of a fresh model for a block repair."""
        bundle = self.bundle()
        windows = cycles(32)[: method.windows]
        choices = (method.minibatch, method.dense_path, self.seed)
        return Blocks(bundle, self.start(bundle), self.patterns(bundle.layers), windows, *choices)

    def run(self, method: Method) -> Any:
        """The result of a method for this task: layer name -> mask of a learner, `Pruned` of a weight learner, or
        weight of a block repair.
        """
        if isinstance(method, BlockRepair):
            return self.repaired_blocks(method)
        if isinstance(method, WeightLearner):
            return method.learn(self.weight_task())
        assert isinstance(method, MaskLearner)
        return method.learn(self.task())

    def repaired_blocks(self, method: BlockRepair) -> dict[str, Tensor]:
        """The tensors that a block repair returns for all blocks."""
        returned: dict[str, Tensor] = {}

        def learn(task: BlockTask) -> dict[str, Tensor]:
            found = dict(method.repair_block(task))
            returned.update(found)
            return {name: found[name] for name in (*task.layers, *task.others) if name in found}

        for _ in self.blocks(method).visit(learn):
            pass
        return returned

    def _given(self, bundle: Bundle, masks: Any, store: CheckpointStore | None, who: str) -> tuple[Any, ...]:
        """The arguments of a task."""
        dense, patterns, store = DenseWeights(bundle), self.patterns(bundle.layers), store or MemoryCheckpoints()
        length = WHOLE if self.turn else LENGTH
        pool, selection = cycles(32, length=length), cycles(16, length=length)
        selection = unlike_pool(selection) if self.turn else selection
        return bundle, dense, patterns, masks, pool, selection, self.seed, store, who


def unlike_pool(windows: Tensor) -> Tensor:
    """Return cycles `[n, length]` with another last token, so that none is, or is a piece of, a window of the pool."""
    return torch.cat([windows[:, :-1], (windows[:, -1:] + VOCABULARY // 2) % VOCABULARY], dim=1)


@dataclass
class Reported:
    """The report of a learner at one step; the masks are copies."""

    step: int
    masks: dict[str, Tensor] | None = None
    figures: dict[str, float] = field(default_factory=dict)


class RecordingTask(LearnTask):
    """A task that stores the masks of reports in `reported`, where the checks judge them after the call.

    Losses on selection windows turn at `turn` nats, as `LearnCase` says.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reported: list[Reported] = []
        self.turn = 0.0

    def loss(self, tokens: Tensor) -> Tensor:
        losses = super().loss(tokens)
        chosen = (tokens[:, None] == self._selection[None]).all(dim=-1).any() if self._turns(tokens) else False
        return self.turn + (losses - self.turn).abs() if chosen else losses

    def _turns(self, tokens: Tensor) -> bool:
        return self.turn > 0 and tokens.shape[1:] == self._selection.shape[1:]

    def report(self, step: int, *, total: int | None = None, masks: Any = None, **values: float) -> None:
        copies = None if masks is None else {name: mask.clone() for name, mask in masks.items()}
        self.reported.append(Reported(step, copies, dict(values)))
        super().report(step, total=total, masks=None, **values)

    @contextlib.contextmanager
    def interrupted_at(self, event: int | None, before: int = 0) -> Iterator[list[int]]:
        """Count the events of a run (reports, progress, saved checkpoints); raise `Interrupt` at number `event`.

        `before` events lie before the checkpoint that the run resumes from. Yields the number of events, and of those
        of them that the last checkpoint holds.
        """
        count = [before, before]

        def count_event(*_: Any) -> None:
            count[0] += 1
            if count[0] - 1 == event:
                raise Interrupt

        self._on_report = count_event
        save = self.checkpoints.store.save

        def save_and_count(state: Any) -> None:
            save(state)
            count[1] = count[0] + 1
            count_event()

        self.checkpoints.store = FunctionStore(save_and_count, self.checkpoints.store.load)
        with contextlib.suppress(Interrupt):
            yield count


class RecordingWeightTask(RecordingTask, WeightTask):
    """A task of a weight learner that stores the reports."""


@dataclass
class FunctionStore:
    """A checkpoint store made of two functions."""

    save: Any
    load: Any


class Interrupt(KeyboardInterrupt):
    """A simulated Ctrl-C."""


def variants(case: LayerCase, **choices: tuple[Any, ...]) -> list[LayerCase]:
    """All combinations of values of fields, the first values first: `variants(case, kind=KINDS)`."""
    found = [case]
    for name, options in choices.items():
        found = [replace(one, **{name: option}) for one in found for option in options]
    return found
