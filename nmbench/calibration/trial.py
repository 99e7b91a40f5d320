"""Proof that a model can be walked: its forward pass, paused at every block, is a plain forward pass.

Passes on several batches are in the model at the same time, and a block is run more than once on its arguments. That
changes nothing unless modules keep something between calls that depends on the tokens. A model is tried once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nmbench.calibration.arguments import changed, tensors_of
from nmbench.calibration.paused_forward import REMEDY, PausedForward, check_order, go_on, paused_forwards
from nmbench.errors import NMBenchError
from nmbench.models.bundle import Bundle
from nmbench.models.discovery import LINEAR
from nmbench.models.forward import run_model
from nmbench.models.hooks import hooks

TOKENS = 256  # of a window that a model is tried on
MOST_ERROR = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative; a GPU adds some sums up in any order
MOST_ERROR_OF_HALVES = 0.02


class Tried(NamedTuple):
    """The outcome for the blocks called `blocks`: the numbers of those that write into their arguments."""

    blocks: tuple[str, ...]
    writing: frozenset[int]


TRIED: WeakKeyDictionary[nn.Module, Tried] = WeakKeyDictionary()


def writing_blocks(bundle: Bundle, windows: Tensor) -> frozenset[int]:
    """The numbers of the blocks that write into their arguments, found on one of `windows` int64 `[windows, tokens]`.

    Raises `NMBenchError` if the model does not call every block once, in order, if it runs another stack of layers
    between them, or if its blocks are given something else when the pass is paused.
    """
    known = TRIED.get(bundle.model)
    if known is None or known.blocks != tuple(bundle.blocks):
        cuda = [bundle.device] if bundle.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            known = TRIED[bundle.model] = Tried(tuple(bundle.blocks), tried(bundle, windows))
    return known.writing


def tried(bundle: Bundle, windows: Tensor) -> frozenset[int]:
    """As `writing_blocks`, whatever was tried before.

    The pass that is compared goes on between two passes of another window, so that state which modules keep is seldom
    its own.
    """
    window = windows[:1, :TOKENS].to(bundle.device)
    other = windows[-1:, :TOKENS].to(bundle.device) if len(windows) > 1 else window.flip(1)
    calls, outputs = plain_calls(bundle, window)
    writing = set()
    with paused_forwards(bundle, [window, other, other], away=bundle.streaming is not None) as passes:
        for index, (name, block) in enumerate(bundle.blocks.items()):
            check_alike(bundle, name, "is given", calls[index], (passes[0].args, passes[0].kwargs))
            with bundle.holding(block, undo=True):
                output, wrote = run_on_copies(block, passes[0])
                check_alike(bundle, name, "computes", outputs[index], output)
                if wrote:
                    writing.add(index)
                if index + 1 < len(bundle.blocks):
                    go_on(bundle, [passes[1], passes[0], passes[2]])
    return frozenset(writing)


def plain_calls(bundle: Bundle, window: Tensor) -> tuple[list[Any], list[Any]]:
    """Copies of what every block is called with in a plain forward pass, and of what it returns.

    Raises `NMBenchError` as `writing_blocks`.
    """
    called: list[str] = []
    calls: list[Any] = []
    outputs: list[Any] = []

    def kept(value: Any) -> Any:
        return changed(value, lambda tensor: tensor.to(bundle.host, copy=True))

    def note(name: str) -> Callable[..., None]:
        def take(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            called.append(name)
            calls.append(kept((args, kwargs)))
            if len(called) > len(bundle.blocks):
                check_order(bundle, called)

        return take

    def beside(name: str) -> Callable[..., None]:
        def refuse(module: nn.Module, args: Any) -> None:
            if 0 < len(called) < len(bundle.blocks):
                raise NMBenchError(f"{bundle.ref} runs {name} between its decoder blocks, which hold it not; {REMEDY}")

        return refuse

    attached = [block.register_forward_pre_hook(note(n), with_kwargs=True) for n, block in bundle.blocks.items()]
    attached += [
        block.register_forward_hook(lambda b, a, out: outputs.append(kept(out))) for block in bundle.blocks.values()
    ]
    attached += [layer.register_forward_pre_hook(beside(n)) for n, layer in stacked_elsewhere(bundle)]
    with hooks(attached):
        run_model(bundle.model, window)
    check_order(bundle, called)
    return calls, outputs


def stacked_elsewhere(bundle: Bundle) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers in lists of modules that hold no decoder block, by name: another stack, perhaps."""
    blocks = {id(block) for block in bundle.blocks.values()}
    stacks = [(name, module) for name, module in bundle.model.named_modules() if isinstance(module, nn.ModuleList)]
    own = [stack for _, stack in stacks if any(id(child) in blocks for child in stack)]
    inside = {id(module) for part in (*own, *bundle.blocks.values()) for module in part.modules()}
    for prefix, stack in stacks:
        for name, module in stack.named_modules(prefix=prefix):
            if isinstance(module, LINEAR) and id(module) not in inside:
                yield name, module


def run_on_copies(block: nn.Module, forward: PausedForward) -> tuple[Any, bool]:
    """Return what a block makes of copies of its arguments, and whether it writes into tensors among them."""
    args, kwargs = changed((forward.args, forward.kwargs), lambda tensor: tensor.to(forward.bundle.device, copy=True))
    given = list(tensors_of((args, kwargs)))
    before = [tensor._version for tensor in given]
    output = block(*args, **kwargs)
    return output, before != [tensor._version for tensor in given]


def check_alike(bundle: Bundle, block: str, what: str, plain: Any, paused: Any) -> None:
    """Raise `NMBenchError` unless a block is given, or computes, the same tensors in both passes, to rounding."""
    ours, theirs = list(tensors_of(paused)), list(tensors_of(plain))
    if len(ours) != len(theirs) or not all(map(alike, ours, theirs)):
        raise NMBenchError(
            f"block {block} of {bundle.ref} {what} something else when the forward pass is paused at every block "
            f"(randomness, or state that modules keep between forward passes?); {REMEDY}"
        )


def alike(a: Tensor, b: Tensor) -> bool:
    """True if tensors, on whatever device each, are equal to rounding; NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    b = b.to(a.device)
    if not a.is_floating_point():
        return torch.equal(a, b)
    most = MOST_ERROR.get(a.dtype, MOST_ERROR_OF_HALVES)
    a, b = (tensor.float().nan_to_num() for tensor in (a, b))
    return bool(norm(a - b) <= most * norm(b))


def norm(values: Tensor) -> Tensor:
    """The norm, in float64: the squares of the numbers in a mask, the least of their dtype, overflow float32."""
    return torch.linalg.vector_norm(values, dtype=torch.float64)
