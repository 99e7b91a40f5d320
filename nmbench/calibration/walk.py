"""The one walk through the decoder that gathers the statistics of layer inputs.

The calibration windows are embedded once. For each block, all windows run through it on the outputs of the (already
pruned) blocks above while hooks gather the statistics of its layers; the caller prunes the block; the windows run
through it again to make the next block's inputs.

Two variations. A sequential walk does this for the layers of a block in several steps, in the order in which they are
executed, so that each is pruned before the inputs of the next are looked at. And where `Stat.DRIFT` or `Stat.LAG` is
asked for, the same windows also run through a copy of every block that stays dense, on the outputs of such copies.

A model that is pruned already can be walked as well: the caller says what its dense weights are.

Fused experts (`expert_inputs`) have statistics of the tokens routed to them. One that no token was routed to is given
the statistics that it has if all tokens of the block are; `Step.fallbacks` names it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nmbench.calibration.block_calls import Run, embed, same
from nmbench.calibration.expert_inputs import ExpertEar, hearing
from nmbench.calibration.finite import ONE_BY_ONE, Checks
from nmbench.calibration.residual_stream import find_taps
from nmbench.calibration.shared_inputs import CommonInputs
from nmbench.calibration.statistics import Gatherer, Skip
from nmbench.errors import NMBenchError
from nmbench.methods import LayerStats, Stat
from nmbench.models.bundle import Bundle, Layer, hidden_width
from nmbench.models.hooks import Ear, Place, listening

BATCH_TOKENS = 4096  # that go through a block at once; more is slower on a CPU
GPU_BATCH_NUMBERS = 2 * 10**7  # of a batch of hidden states; a GPU is not busy with 4096 tokens of a narrow model
BESIDE = Stat.DRIFT | Stat.LAG  # what takes the dense model beside the pruned one


@dataclass(frozen=True)
class Step:
    """Layers of one block that are to be pruned now, and their statistics by layer name.

    `last`: no more layers of this block follow. `block_tokens`: the tokens that went through the block for this step,
    and after its last one will go through it again to make the inputs of the next block, if there is one.
    """

    index: int
    layers: Sequence[Layer]
    stats: Mapping[str, LayerStats]
    last: bool
    block_tokens: int
    fallbacks: Sequence[str] = ()


@torch.no_grad()
def walk(
    bundle: Bundle,
    windows: Tensor,
    needs: Stat,
    sequential: bool = False,
    skip_tokens: int = 0,
    original: Callable[[Layer], Tensor] | None = None,
    start: int = 0,
    undo: bool = False,
    checks: Checks = ONE_BY_ONE,
) -> Iterator[Step]:
    """Visit the blocks from first to last; what the caller does to a block's weights is seen by the blocks below.

    If `undo`, the prunable weights of a block are put back as they were before, once its outputs have been computed: a
    copy where the block is costs less than one from the host.

    `windows` is int64 `[windows, window_tokens]`; the first `skip_tokens` of each are in no statistic. A block is one
    step, or several if `sequential`. `original` gives the dense weight `[out, in]` of a layer, if the live ones are not
    dense. The blocks before `start` are passed through and no more. TF32 is off while statistics are gathered. `checks`
    says when the statistics are found to be finite. Raises `NMBenchError` if no token of a window is left.
    """
    skip = Skip(skip_tokens, windows.shape[1])
    check_skip(skip)
    hidden, calls = embed(bundle, batches_of(bundle, windows))
    dense = hidden if needs & BESIDE else []
    for index, (name, block) in enumerate(bundle.blocks.items()):
        run = Run({size: captured[index] for size, captured in calls.items()}, bundle.device, bundle.host)
        onward = index + 1 < len(bundle.blocks)
        inside = bundle.block_layers(index)
        with bundle.holding(block), undoing(inside if undo else ()):
            layers = {layer.name.removeprefix(f"{name}."): layer for layer in inside}
            twin = dense_copy(block, layers.values(), original) if needs & BESIDE else None
            if index < start:
                with full_float32():  # as what gathers statistics
                    outputs = [run(twin, batch) for batch in dense] if twin is not None else []
                hidden, dense = [run(block, batch) for batch in hidden], outputs
                continue
            first = hidden[0].to(bundle.device)
            modules = [n for n, layer in layers.items() if not layer.fused]
            taps = find_taps(run, block, first, modules) if Stat.LAG in needs else {}
            parts = stages(run, block, first, layers) if sequential else [list(layers)]
            for part in parts:
                for alone in (layers if twin is not None else (), layers):  # of what some hear now and then only: all
                    common = CommonInputs(alone)
                    gatherers = {
                        n: Gatherer(needs, layers[n].shape, bundle.device, n in taps, None if layers[n].fused else skip)
                        for n in part
                    }
                    fused = expert_ears(gatherers, layers, name, twin)
                    heard = ears(gatherers, layers, taps, block, twin, common)
                    with full_float32(), listening(heard), hearing(fused, skip):
                        outputs = pass_through(run, block, hidden, twin, dense)
                    leaders = common.leaders()
                    if leaders is not None:
                        break
                assert leaders is not None
                unreached = [n for n in part if layers[n].fused and not gatherers[n].tokens]
                if unreached:
                    fused = expert_ears({n: gatherers[n] for n in unreached}, layers, name, twin)
                    with full_float32(), hearing(fused, skip, rerouted=True):
                        pass_through(run, block, hidden, twin, dense)
                fallbacks = [layers[n].name for n in unreached]
                last = part is parts[-1]
                tokens, run.tokens = run.tokens + (last and onward) * windows.numel(), 0
                own = {
                    n: g.finish(len(windows), layers[n].name, checks) for n, g in gatherers.items() if n not in leaders
                }
                stats = {layers[n].name: own[n] if n in own else copied(own[leaders[n]]) for n in part}
                yield Step(index, [layers[n] for n in part], stats, last, tokens, fallbacks)
            if onward:
                hidden, dense = [run(block, batch) for batch in hidden], outputs


def batch_tokens(bundle: Bundle, device: torch.device) -> int:
    """How many tokens go through a block at once on a device, or one window if that is longer."""
    return BATCH_TOKENS if device.type == "cpu" else max(BATCH_TOKENS, GPU_BATCH_NUMBERS // hidden_width(bundle))


def batches_of(bundle: Bundle, windows: Tensor) -> Sequence[Tensor]:
    """The windows int64 `[windows, window_tokens]` in batches, where the model computes."""
    return windows.to(bundle.device).split(max(1, batch_tokens(bundle, bundle.device) // windows.shape[1]))


class FewTokens:
    """Remembers for the record the fused experts that too few calibration tokens were routed to.

    `never_reached`: pruned by the statistics of all tokens of their block. `under_calibrated`: pruned by those of fewer
    tokens than a weight has inputs, whose Gram matrix is singular; the number of tokens.
    """

    def __init__(self) -> None:
        self.never_reached: list[str] = []
        self.under_calibrated: dict[str, int] = {}

    def note(self, step: Step) -> None:
        """Look at one step; a layer that is visited again counts once."""
        self.never_reached += [name for name in step.fallbacks if name not in self.never_reached]
        for layer in step.layers:
            tokens = step.stats[layer.name].tokens
            if layer.fused and layer.name not in step.fallbacks and tokens < layer.shape[1]:
                self.under_calibrated[layer.name] = tokens

    @property
    def experts(self) -> dict[str, Any]:
        """The two lists by name, for the record; an empty one is left out."""
        content = {"never_reached": self.never_reached, "under_calibrated": self.under_calibrated}
        return {name: value for name, value in content.items() if value}


def dense_copy(block: nn.Module, layers: Collection[Layer], original: Callable[[Layer], Tensor] | None) -> nn.Module:
    """A copy of a block with dense weights; the block itself is left as it was."""
    if original is None:
        return copy.deepcopy(block)
    with undoing(layers):
        for layer in layers:
            layer.write(original(layer))
        return copy.deepcopy(block)


@contextlib.contextmanager
def undoing(layers: Collection[Layer]) -> Iterator[None]:
    """What becomes of the weights of layers while the context is open is undone at its end."""
    before = [layer.read().clone() for layer in layers]
    try:
        yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.write(weight)


def check_skip(skip: Skip) -> None:
    if not 0 <= skip.tokens < skip.window_tokens:
        raise NMBenchError(
            f"skip_tokens is {skip.tokens}, but calibration windows have {skip.window_tokens} tokens; skip fewer, or "
            f"give more --window-tokens."
        )


def stages(run: Run, block: nn.Module, hidden: Tensor, layers: Mapping[str, Layer]) -> list[list[str]]:
    """Layers in the order in which a block executes them, those that are given the same inputs together.

    Fused experts of one parameter stay together. Layers that `hidden` does not reach join the last ones.
    """
    heard: dict[str, Tensor] = {}  # first inputs, in the order of execution; copies, as a block may work in place
    members: dict[str, list[str]] = {}
    for name, layer in layers.items():
        members.setdefault(layer.where.stored, []).append(name)

    def tell(name: str) -> Callable[[Tensor], None]:
        first = layers[name].where.stored
        return lambda inputs: heard.update({first: inputs.clone()} if first not in heard else {})

    with (
        listening(Ear(layer.module, tell(name)) for name, layer in layers.items() if not layer.fused),
        hearing(ExpertEar(layer.module, layer.where, tell(name)) for name, layer in layers.items() if layer.fused),
    ):
        run(block, hidden)
    parts: list[list[str]] = []
    for stored, inputs in heard.items():
        alike = [part for part in parts if same(heard[part[0]], inputs)]
        if not alike:
            parts.append([])
        (alike or parts)[-1].append(stored)
    unheard = [stored for stored in members if stored not in heard]
    parts = [*parts[:-1], [*(parts[-1] if parts else []), *unheard]]
    return [[name for stored in part for name in members[stored]] for part in parts]


def pass_through(
    run: Run, block: nn.Module, hidden: Sequence[Tensor], twin: nn.Module | None, dense: Sequence[Tensor]
) -> list[Tensor]:
    """Run all batches through a block, each after its dense counterpart through the dense `twin`.

    Returns the outputs of the twin.
    """
    outputs = []
    for number, batch in enumerate(hidden):
        if twin is not None:
            outputs.append(run(twin, dense[number]))
        run(block, batch)
    return outputs


def ears(
    gatherers: Mapping[str, Gatherer],
    layers: Mapping[str, Layer],
    taps: Mapping[str, Place],
    block: nn.Module,
    twin: nn.Module | None,
    common: CommonInputs,
) -> Iterator[Ear]:
    """What of a block, and of its dense `twin`, is told to the gatherers of layers that are modules."""
    for name, gatherer in gatherers.items():
        if layers[name].fused:
            continue
        inputs = Place(name, output=False)
        yield Ear.at(inputs, block, common.once(name, gatherer.add))
        if twin is not None:
            yield Ear.at(inputs, twin, gatherer.add_dense)
        if twin is not None and name in taps:
            yield Ear.at(taps[name], block, gatherer.add_stream)
            yield Ear.at(taps[name], twin, gatherer.add_dense_stream)


def expert_ears(
    gatherers: Mapping[str, Gatherer], layers: Mapping[str, Layer], block_name: str, twin: nn.Module | None
) -> Iterator[ExpertEar]:
    """What is told to the gatherers of fused experts."""
    for name, gatherer in gatherers.items():
        if layers[name].fused:
            where = layers[name].where
            inside = where.module.removeprefix(block_name).removeprefix(".")
            beside = None if twin is None else twin.get_submodule(inside)
            yield ExpertEar(layers[name].module, where, gatherer.add, beside, gatherer.add_dense)


def copied(stats: LayerStats) -> LayerStats:
    """Statistics of the same inputs for another layer: a method may spoil what it is lent."""
    norm, gram = (None if value is None else value.clone() for value in (stats.input_norm, stats.gram))
    return dataclasses.replace(stats, input_norm=norm, gram=gram)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Switch TF32 off: a Gram matrix of 10-bit products is not one a Cholesky factorisation survives."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
