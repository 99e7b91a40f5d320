"""The evidence of a step of flips: errors of activations times inputs, from the dense and the pruned model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import nmbench
from nmbench.calibration import full_float32, until, walk
from nmbench.pruning import LiveWeights


class Evidence(NamedTuple):
    """Means over tokens, float32, by layer: `gram` H `[in, in]`, and `error` E `[out, in]`.

    Layers with the same inputs share one matrix H.
    """

    gram: dict[str, Tensor]
    error: dict[str, Tensor]


class Seen(NamedTuple):
    """One pass: inputs `[n, window, in]` and outputs `[n, window, out]` by layer, and the hidden state at the end."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    hidden: Tensor


def writers(task: nmbench.LearnTask) -> set[str]:
    """Return the layers that write into the residual stream, found with one window of the pool."""
    window = task.pool[:1]
    most = max(len(task.bundle.block_layers(index)) for index in range(len(task.bundle.blocks)))
    task.count_forward((6 + most) * window.numel())  # every layer of a block is probed, beside six passes at most
    steps = walk(task.bundle, window, nmbench.Stat.LAG)
    return {name for step in steps for name, stats in step.stats.items() if stats.lag is not None}


def gathered(
    task: nmbench.LearnTask,
    live: LiveWeights,
    masks: Mapping[str, Tensor],
    windows: Tensor,
    stream: Sequence[str],
    local: Sequence[str],
    minibatch: int,
    skip: int,
) -> Evidence:
    """Return the evidence of `windows` int64 `[n, window_tokens]` for the layers `stream` and `local`.

    Layers that do not get the tokens of every window in order, such as experts, get no evidence. The weights are those
    of `masks` before and after.
    """
    evidence, tokens = Evidence({}, {}), 0
    for part in windows.split(minibatch):
        for name in task.layers:
            live[name].copy_(live.original(name))
        dense = seen(task, part, local)
        live.apply(masks)
        pruned = seen(task, part, (*stream, *local))
        add(evidence, errors(dense, pruned, stream), pruned.inputs, skip)
        tokens += len(part) * (part.shape[1] - skip)
    sums = {id(gram): gram for gram in evidence.gram.values()}  # shared ones once
    for total in (*sums.values(), *evidence.error.values()):
        total.div_(tokens)
    return evidence


def errors(dense: Seen, pruned: Seen, stream: Sequence[str]) -> dict[str, Tensor]:
    """Return T `[n, window, out]` by layer: pruned less dense, of the hidden state at the end or of the outputs."""
    end = pruned.hidden.float() - dense.hidden.float()
    of_stream = {name: end for name in stream if name in pruned.inputs}
    both = (name for name in dense.outputs if name in pruned.outputs)
    return {**{name: pruned.outputs[name].float() - dense.outputs[name].float() for name in both}, **of_stream}


def add(evidence: Evidence, errors: Mapping[str, Tensor], inputs: Mapping[str, Tensor], skip: int) -> None:
    """Add a minibatch to sums; layers whose inputs are one tensor add it to one sum."""
    leaders: dict[int, str] = {}
    with full_float32():
        for name, error in errors.items():
            x = inputs[name][:, skip:].flatten(0, 1).float()  # [tokens, in]
            t = error[:, skip:].flatten(0, 1)  # [tokens, out]
            if name not in evidence.error:
                leader = leaders.get(id(inputs[name]))
                evidence.gram[name] = evidence.gram[leader] if leader else x.new_zeros(x.shape[1], x.shape[1])
                evidence.error[name] = x.new_zeros(t.shape[1], x.shape[1])
            if all(evidence.gram[name] is not evidence.gram[leader] for leader in leaders.values()):
                leaders[id(inputs[name])] = name
                evidence.gram[name].addmm_(x.t(), x)
            evidence.error[name].addmm_(t.t(), x)


def seen(task: nmbench.LearnTask, part: Tensor, layers: Sequence[str]) -> Seen:
    """Return what one pass of `part` int64 `[n, window]` up to the end of the last block shows; tokens are counted."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def note(name: str, given: Tensor, output: Tensor) -> None:
        if given.dim() == 3 and given.shape[:2] == part.shape:
            inputs[name], outputs[name] = given, output.detach()

    task.count_forward(part.numel())
    with watching(task, layers, note):
        hidden = until(task.bundle, len(task.bundle.blocks) - 1, part)
    return Seen(inputs, outputs, first_tensor(hidden))


@contextlib.contextmanager
def watching(task: nmbench.LearnTask, layers: Sequence[str], change: Any) -> Iterator[None]:
    """While the context is open, `change(name, inputs, output)` is called after a layer, and may return an output."""

    def hook(name: str) -> Any:
        def call(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Any:
            return change(name, args[0] if args else next(iter(kwargs.values())), output)

        return call

    chosen = [task.bundle.layers[name] for name in layers if not task.bundle.layers[name].fused]
    handles = [layer.module.register_forward_hook(hook(layer.name), with_kwargs=True) for layer in chosen]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(values: Any) -> Tensor:
    """Return the hidden state among what a block returned."""
    if isinstance(values, Tensor):
        return values
    parts = values.values() if isinstance(values, dict) else values
    return next(part for part in parts if isinstance(part, torch.Tensor))
