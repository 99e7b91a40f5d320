"""One block of a walk: its statistics are gathered, in one step or in several."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nmbench.calibration.across_ranks import added_up, found_by_first, pooled
from nmbench.calibration.arguments import tensors_of
from nmbench.calibration.expert_inputs import ExpertObserver, observing_experts
from nmbench.calibration.expert_modules import calling_experts
from nmbench.calibration.finite import Checks
from nmbench.calibration.gram import full_float32
from nmbench.calibration.paused_forward import PausedForward
from nmbench.calibration.residual_stream import find_taps
from nmbench.calibration.shared_inputs import CommonInputs
from nmbench.calibration.statistics import Gatherer, Skip
from nmbench.calibration.step import Step
from nmbench.methods import LayerStats, Stat
from nmbench.models.bundle import Bundle, Layer
from nmbench.models.hooks import Observer, Place, observing
from nmbench.runtime.ranks import ALONE, Ranks

BESIDE = Stat.DRIFT | Stat.LAG  # statistics that compare with the dense model


@dataclass(frozen=True)
class Rules:
    """The statistics that a walk over `windows` windows gathers, and how: the arguments of `walk`.

    `windows`: those of all `ranks`.
    """

    needs: Stat
    windows: int
    sequential: bool
    skip: Skip
    original: Callable[[Layer], Tensor] | None
    checks: Checks
    ranks: Ranks = ALONE

    @property
    def beside(self) -> bool:
        """True if the dense model runs beside the pruned one."""
        return bool(self.needs & BESIDE)


class BlockVisit:
    """The block `index`, at whose entry the passes `live` wait, and where dense weights matter the passes `dense`."""

    def __init__(
        self, bundle: Bundle, index: int, live: Sequence[PausedForward], dense: Sequence[PausedForward], rules: Rules
    ) -> None:
        self.bundle, self.index, self.live, self.dense, self.rules = bundle, index, live, dense, rules
        self.name, self.block = list(bundle.blocks.items())[index]
        self.layers = {layer.name.removeprefix(f"{self.name}."): layer for layer in bundle.block_layers(index)}
        self.dense_block = dense_copy(self.block, self.layers.values(), rules.original) if rules.beside else None
        self.tokens = 0  # that went through the block since the last step, on all ranks
        self.own_tokens = 0  # that went through it here since the ranks met

    def steps(self) -> Iterator[Step]:
        """The layers of the block with their statistics, those of earlier steps being pruned by then."""
        ranks = self.rules.ranks
        taps = found_by_first(ranks, self._taps) if Stat.LAG in self.rules.needs else {}
        parts = found_by_first(ranks, self._parts) if self.rules.sequential else [list(self.layers)]
        for part in parts:
            yield self._step(part, taps, last=part is parts[-1])

    def pass_by(self) -> None:
        """Run the dense copy only, whose outputs the dense passes go on with."""
        if self.dense_block is not None:
            with full_float32():  # as while statistics are gathered
                for forward in self.dense:
                    forward.again(self.dense_block, keep=True)

    def _step(self, part: Sequence[str], taps: Mapping[str, Place], last: bool) -> Step:
        gatherers, leaders = self._gathered(part, taps, keep=last)
        unreached = self._unreached({n: g for n, g in gatherers.items() if not g.tokens and n not in leaders})
        tokens, self.tokens = self.tokens, 0
        if last and self.index + 1 < len(self.bundle.blocks):
            tokens += self.rules.windows * self.rules.skip.window_tokens
        return Step(
            self.index,
            [self.layers[name] for name in part],
            self._finished(gatherers, leaders),
            last,
            tokens,
            [self.layers[name].name for name in unreached],
        )

    def _unreached(self, gatherers: Mapping[str, Gatherer]) -> list[str]:
        """Gather all tokens of the block for experts without tokens; return the names of these experts."""
        fused = {name: gatherer for name, gatherer in gatherers.items() if self.layers[name].fused}
        modules = {name: gatherer for name, gatherer in gatherers.items() if self.layers[name].listed}
        if fused:
            self._gather(fused, rerouted=True)
        if modules:
            alone = CommonInputs(self.layers)
            with contextlib.ExitStack() as stack:
                for block in filter(None, (self.block, self.dense_block)):
                    stack.enter_context(calling_experts(block, modules))
                stack.enter_context(observing(observers(modules, self.layers, {}, self.block, self.dense_block, alone)))
                self._gather(modules)
        if gatherers:
            self._pool(gatherers)
        return [name for name in (*fused, *modules) if gatherers[name].tokens]

    def _gathered(
        self, part: Sequence[str], taps: Mapping[str, Place], keep: bool
    ) -> tuple[dict[str, Gatherer], dict[str, str]]:
        """Sums for the layers of a part, and which of them lead which others: layers with the same inputs."""
        alone = self.layers if self.dense_block is not None else ()  # beside the dense model, nothing is shared
        for apart in (alone, self.layers):  # again, each for itself, if layers share inputs in some batches only
            common = CommonInputs(apart)
            gatherers = {name: self._gatherer(name, name in taps) for name in part}
            with observing(observers(gatherers, self.layers, taps, self.block, self.dense_block, common)):
                self._gather(gatherers, keep)
            self._pool(gatherers, common)
            if (leaders := common.leaders()) is not None:
                return gatherers, leaders
        raise AssertionError("layers that are alone have no leaders")

    def _pool(self, gatherers: Mapping[str, Gatherer], common: CommonInputs | None = None) -> None:
        """Make counts those of all ranks."""
        self.tokens += pooled(self.rules.ranks, gatherers.values(), common, self.own_tokens)
        self.own_tokens = 0

    def _gatherer(self, name: str, tapped: bool) -> Gatherer:
        layer = self.layers[name]
        skip = None if layer.fused else self.rules.skip  # the inputs of fused experts come without first tokens
        return Gatherer(self.rules.needs, layer.shape, self.bundle.device, tapped, skip)

    def _gather(self, gatherers: Mapping[str, Gatherer], keep: bool = False, rerouted: bool = False) -> None:
        """Run all batches through the block, each after its dense counterpart through the dense copy."""
        fused = expert_observers(gatherers, self.layers, self.name, self.dense_block)
        with full_float32(), observing_experts(fused, self.rules.skip, rerouted):
            for number, forward in enumerate(self.live):
                if self.dense_block is not None:
                    self._run(self.dense[number], self.dense_block, keep)
                self._run(forward, self.block)

    def _run(self, forward: PausedForward, module: nn.Module, keep: bool = False) -> None:
        self.own_tokens += forward.batch.numel()
        forward.again(module, keep)

    def _finished(self, gatherers: Mapping[str, Gatherer], leaders: Mapping[str, str]) -> dict[str, LayerStats]:
        """Statistics by layer name; a layer with a leader has copies of those of its leader."""
        leading = {name: gatherer for name, gatherer in gatherers.items() if name not in leaders}
        added_up(self.rules.ranks, leading.values())
        own = {
            name: gatherer.finish(self.rules.windows, self.layers[name].name, self.rules.checks)
            for name, gatherer in leading.items()
        }
        return {self.layers[n].name: own[n] if n in own else copied(own[leaders[n]]) for n in gatherers}

    def _taps(self) -> dict[str, Place]:
        """Where layers of the block write into the residual stream, found with the first batch."""
        first = self.live[0]
        hidden = next((t for t in tensors_of((first.args, first.kwargs)) if is_hidden(t, first.batch)), None)
        modules = [name for name, layer in self.layers.items() if not layer.fused]
        if hidden is None:
            return {}
        return find_taps(lambda: self._run(first, self.block), self.block, hidden.to(self.bundle.device), modules)

    def _parts(self) -> list[list[str]]:
        return stages(lambda: self._run(self.live[0], self.block), self.layers)


def is_hidden(tensor: Tensor, batch: Tensor) -> bool:
    """True if a tensor has the form of hidden states `[windows, window_tokens, width]` of a batch of tokens."""
    return tensor.is_floating_point() and tensor.dim() == 3 and tensor.shape[:2] == batch.shape


def dense_copy(block: nn.Module, layers: Collection[Layer], original: Callable[[Layer], Tensor] | None) -> nn.Module:
    """A copy of a block, with dense weights; the weights of the block itself do not change."""
    if original is None:
        return copy.deepcopy(block)
    with undoing(layers):
        for layer in layers:
            layer.write(original(layer))
        return copy.deepcopy(block)


def stages(run: Callable[[], object], layers: Mapping[str, Layer]) -> list[list[str]]:
    """Layers in the order in which a block executes them; layers with the same inputs are together.

    `run` runs the block on one batch. Fused experts of one parameter stay together. Layers that this batch does not
    reach join the last ones.
    """
    inputs_of: dict[str, Tensor] = {}  # first inputs, in the order of execution; copies, as a block may work in place
    members: dict[str, list[str]] = {}
    for name, layer in layers.items():
        members.setdefault(layer.where.stored, []).append(name)

    def note(name: str) -> Callable[[Tensor], None]:
        first = layers[name].where.stored
        return lambda inputs: inputs_of.update({first: inputs.clone()} if first not in inputs_of else {})

    fused = [ExpertObserver(layer.module, layer.where, note(name)) for name, layer in layers.items() if layer.fused]
    modules = [Observer(layer.module, note(name)) for name, layer in layers.items() if not layer.fused]
    with observing(modules), observing_experts(fused):
        run()
    parts: list[list[str]] = []
    for stored, inputs in inputs_of.items():
        alike = [part for part in parts if equal(inputs_of[part[0]], inputs)]
        if not alike:
            parts.append([])
        (alike or parts)[-1].append(stored)
    unreached = [stored for stored in members if stored not in inputs_of]
    parts = [*parts[:-1], [*(parts[-1] if parts else []), *unreached]]
    return [[name for stored in part for name in members[stored]] for part in parts]


def observers(
    gatherers: Mapping[str, Gatherer],
    layers: Mapping[str, Layer],
    taps: Mapping[str, Place],
    block: nn.Module,
    dense_block: nn.Module | None,
    common: CommonInputs,
) -> Iterator[Observer]:
    """Observers of a block and of its dense copy, for the gatherers of layers that are modules."""
    for name, gatherer in gatherers.items():
        if layers[name].fused:
            continue
        inputs = Place(name, output=False)
        yield Observer.at(inputs, block, common.once(name, gatherer.add))
        if dense_block is not None:
            yield Observer.at(inputs, dense_block, gatherer.add_dense)
        if dense_block is not None and name in taps:
            yield Observer.at(taps[name], block, gatherer.add_stream)
            yield Observer.at(taps[name], dense_block, gatherer.add_dense_stream)


def expert_observers(
    gatherers: Mapping[str, Gatherer], layers: Mapping[str, Layer], block_name: str, dense_block: nn.Module | None
) -> Iterator[ExpertObserver]:
    """Observers for the gatherers of fused experts."""
    for name, gatherer in gatherers.items():
        if layers[name].fused:
            where = layers[name].where
            inside = where.module.removeprefix(block_name).removeprefix(".")
            beside = None if dense_block is None else dense_block.get_submodule(inside)
            yield ExpertObserver(layers[name].module, where, gatherer.add, beside, gatherer.add_dense)


def copied(stats: LayerStats) -> LayerStats:
    """Statistics of the same inputs for another layer. A copy, because a method may write into its statistics."""
    norm, gram = (None if value is None else value.clone() for value in (stats.input_norm, stats.gram))
    return dataclasses.replace(stats, input_norm=norm, gram=gram)


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


@contextlib.contextmanager
def undoing(layers: Collection[Layer]) -> Iterator[None]:
    """At the end of the context, the weights of the layers are put back as they were at its beginning."""
    before = [layer.read().clone() for layer in layers]
    try:
        yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.write(weight)
