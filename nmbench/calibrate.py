"""The one walk through the decoder that gathers the statistics of layer inputs.

The calibration windows are embedded once. For each block, all windows run through it on the outputs of the (already
pruned) blocks above while hooks gather the statistics of its layers; the caller prunes the block; the windows run
through it again to make the next block's inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nmbench.errors import NMBenchError, NumericalFailure
from nmbench.methods import LayerStats, Stat
from nmbench.models import Bundle, Layer

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Call:
    """How the model calls one block: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        output = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output  # transformers 5 returns the tensor itself


@dataclass(frozen=True)
class Step:
    """One block of the walk: its index, its layers, and their statistics by layer name."""

    index: int
    layers: Sequence[Layer]
    stats: Mapping[str, LayerStats]


class Gatherer:
    """Sums up the inputs of one layer in float32, whatever the dtype of the model."""

    def __init__(self, needs: Stat, inputs: int, device: torch.device) -> None:
        self.tokens = 0
        self.squares = torch.zeros(inputs, device=device) if Stat.INPUT_NORM in needs else None
        self.gram = torch.zeros(inputs, inputs, device=device) if Stat.GRAM in needs else None

    def add(self, inputs: Tensor) -> None:
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()  # [tokens, in]
        self.tokens += len(x)
        if self.squares is not None:
            self.squares += x.square().sum(dim=0)
        if self.gram is not None:
            self.gram.addmm_(x.t(), x)

    def finish(self, windows: int, name: str) -> LayerStats:
        """Scale the sums. Raises `NumericalFailure` for NaN or infinite inputs, `NMBenchError` if there were none."""
        if not self.tokens:
            raise NMBenchError(
                f"no calibration token reached layer {name}; give more --windows, or leave it dense with "
                f"--skip {name!r}."
            )
        norm = None if self.squares is None else (self.squares / windows).sqrt()
        gram = None if self.gram is None else self.gram * (2.0 / windows)
        for statistic in (norm, gram):
            if statistic is not None and not statistic.isfinite().all():
                raise NumericalFailure(f"the inputs of layer {name} hold NaN or infinite values during calibration.")
        return LayerStats(windows, self.tokens, norm, gram)


@torch.no_grad()
def walk(bundle: Bundle, windows: Tensor, needs: Stat) -> Iterator[Step]:
    """Visit the blocks from first to last; what the caller does to a block's weights is seen by the blocks below.

    `windows` is int64 `[windows, window_tokens]`. TF32 is off while statistics are gathered.
    """
    batches = windows.to(bundle.device).split(max(1, BATCH_TOKENS // windows.shape[1]))
    hidden, calls = embed(bundle, batches)
    for index, block in enumerate(bundle.blocks.values()):
        layers = bundle.block_layers(index)
        gatherers = {layer.name: Gatherer(needs, layer.shape[1], bundle.device) for layer in layers}
        with full_float32(), listening(layers, gatherers):
            advance(block, hidden, calls, index, keep=False)
        yield Step(index, layers, {name: g.finish(len(windows), name) for name, g in gatherers.items()})
        if index + 1 < len(bundle.blocks):
            hidden = advance(block, hidden, calls, index, keep=True)


def advance(
    block: nn.Module, hidden: Sequence[Tensor], calls: Mapping[int, Sequence[Call]], index: int, keep: bool
) -> list[Tensor]:
    """Run every batch through one block; keep the outputs if they are the next block's inputs."""
    outputs = []
    for batch in hidden:
        output = calls[len(batch)][index](block, batch)
        if keep:
            outputs.append(output)
    return outputs


def embed(bundle: Bundle, batches: Sequence[Tensor]) -> tuple[list[Tensor], dict[int, list[Call]]]:
    """The inputs of the first block for every batch, and how each block is called, by batch size.

    Blocks differ in their arguments (Gemma alternates masks and rotary tables), so each keeps its own. A batch size
    seen before needs the embedding only. Raises `NMBenchError` if the arguments depend on the tokens.
    """
    calls: dict[int, list[Call]] = {}
    hidden = []
    for batch in batches:
        known = calls.get(len(batch))
        inputs, captured = capture(bundle, batch, blocks=1 if known else len(bundle.blocks))
        if known is None:
            calls[len(batch)] = captured
        elif not same(known[0], captured[0]):
            raise NMBenchError(f"the blocks of {bundle.ref} are called with arguments that depend on the tokens.")
        hidden.append(inputs)
    return hidden, calls


class Seen(Exception):
    """Stops a forward pass whose remaining blocks are of no interest."""


def capture(bundle: Bundle, batch: Tensor, blocks: int) -> tuple[Tensor, list[Call]]:
    """Run the model on `batch` as far as the first `blocks` blocks; return the first one's input and all the calls."""
    inputs: list[Tensor] = []
    calls: list[Call] = []

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states")
        if not inputs:
            inputs.append(hidden)
        calls.append(Call(args[1:], rest))
        if len(calls) == blocks:
            raise Seen

    attached = [block.register_forward_pre_hook(note, with_kwargs=True) for block in bundle.blocks.values()]
    with hooks(attached), contextlib.suppress(Seen):
        bundle.model(input_ids=batch, use_cache=False)  # a captured cache would grow on every replay
    if len(calls) != blocks:
        raise NMBenchError(
            f"{bundle.ref} calls {len(calls)} of its {blocks} blocks; it cannot be walked block by block."
        )
    return inputs[0], calls


@contextlib.contextmanager
def listening(layers: Sequence[Layer], gatherers: Mapping[str, Gatherer]) -> Iterator[None]:
    """While the context is open, the inputs of `layers` go to their gatherers."""

    def listener(gatherer: Gatherer) -> Callable[..., None]:
        return lambda module, args: gatherer.add(args[0])

    with hooks(layer.module.register_forward_pre_hook(listener(gatherers[layer.name])) for layer in layers):
        yield


@contextlib.contextmanager
def hooks(handles: Iterable[Any]) -> Iterator[None]:
    """Remove the hooks at the end, whatever happens."""
    attached = list(handles)
    try:
        yield
    finally:
        for handle in attached:
            handle.remove()


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Switch TF32 off: a Gram matrix of 10-bit products is not one a Cholesky factorisation survives."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def same(a: Any, b: Any) -> bool:
    """Whether two captured calls, or parts of them, are equal; objects of other kinds are taken as equal."""
    if isinstance(a, Call) and isinstance(b, Call):
        return same(a.args, b.args) and same(dict(a.kwargs), dict(b.kwargs))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return True
