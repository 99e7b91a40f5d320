"""How a model calls its blocks: captured in a forward pass, so that one block at a time can be run later."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nmbench.errors import NMBenchError
from nmbench.models.bundle import Bundle
from nmbench.models.hooks import hidden_of, hooks, instead

PLAIN = (int, float, str, torch.dtype, torch.device, type(None))  # values that say all that they are


@dataclass(frozen=True)
class Call:
    """How the model calls one block: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        return hidden_of(block(hidden, *self.args, **self.kwargs))


class Run:
    """Runs one block on hidden states `[batch, window_tokens, width]` as the model does; `calls` by batch size.

    It computes on `device` and returns its results on `host`; by default, where the hidden states are. Counts the
    `tokens` that it ran.
    """

    def __init__(
        self, calls: Mapping[int, Call], device: torch.device | None = None, host: torch.device | None = None
    ) -> None:
        self.calls = calls
        self.device = device
        self.host = host
        self.tokens = 0

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        self.tokens += hidden.shape[:2].numel()
        return self.calls[len(hidden)](block, hidden.to(self.device)).to(self.host)


def embed(bundle: Bundle, batches: Sequence[Tensor]) -> tuple[list[Tensor], dict[int, list[Call]]]:
    """The inputs of the first block for every batch, and how each block is called, by batch size.

    Blocks differ in their arguments (Gemma alternates masks and rotary tables), so each keeps its own. A batch size
    seen before needs the embedding only; a new one needs the blocks only if the arguments come from what they compute.
    Raises `NMBenchError` if the arguments depend on the tokens, or if the hidden states are no
    `[windows, window_tokens, width]`.
    """
    calls: dict[int, list[Call]] = {}
    hidden = []
    every = len(bundle.blocks)
    idle = len(batches[0]) > 1 and arguments_need_no_blocks(bundle, batches[0])
    for batch in batches:
        known = calls.get(len(batch))
        with standing_in(bundle) if idle and known is None else contextlib.nullcontext():
            inputs, captured = capture(bundle, batch, blocks=1 if known else every)
        if known is None:
            calls[len(batch)] = captured
        elif not same(known[0], captured[0]):
            raise NMBenchError(f"the blocks of {bundle.ref} are called with arguments that depend on the tokens.")
        if inputs.dim() != 3 or inputs.shape[:2] != batch.shape:
            raise NMBenchError(
                f"the blocks of {bundle.ref} are given hidden states {tuple(inputs.shape)} for tokens "
                f"{tuple(batch.shape)}, not [windows, tokens, width]; it cannot be walked block by block."
            )
        hidden.append(inputs.to(bundle.host))
    return hidden, calls


def arguments_need_no_blocks(bundle: Bundle, batch: Tensor) -> bool:
    """Whether the blocks of a model are called in the same way when none of them computes anything.

    It is tried on the first two windows of `batch`, int64 `[2 or more, window_tokens]`: what differs between them, or
    is of an unknown kind, may come from what blocks compute. Blocks that come from the host are not worth it: they
    would be fetched several times. Raises what `capture` raises.
    """
    if bundle.streaming:
        return False
    plain: list[bool] = []
    noted = [
        block.register_forward_hook(lambda block, args, output: plain.append(isinstance(output, Tensor)))
        for block in bundle.blocks.values()
    ]
    with hooks(noted):
        first, second = (capture(bundle, window, len(bundle.blocks))[1] for window in batch[:2].split(1))
    if not all(plain):
        return False
    with standing_in(bundle):
        _, idle = capture(bundle, batch[:1], len(bundle.blocks))
    return all(same(a, b, strict=True) and same(a, c, strict=True) for a, b, c in zip(first, second, idle, strict=True))


@contextlib.contextmanager
def standing_in(bundle: Bundle) -> Iterator[None]:
    """While the context is open, every block returns the hidden states as it was given them."""

    def unchanged(*args: Any, **kwargs: Any) -> Any:
        return args[0] if args else kwargs["hidden_states"]

    with contextlib.ExitStack() as stack:
        for block in bundle.blocks.values():
            stack.enter_context(instead(block, unchanged))
        yield


class Seen(Exception):
    """Stops a forward pass whose remaining blocks are of no interest."""


def capture(bundle: Bundle, batch: Tensor, blocks: int) -> tuple[Tensor, list[Call]]:
    """Run the model on `batch` as far as the first `blocks` blocks; return the first one's input and all the calls.

    Where that is all of them, it runs on to the output embeddings, to see whether a block is called again.
    Raises `NMBenchError` unless every block is called once, in order, or if blocks tell each other something in a
    container that they are all given.
    """
    inputs: list[Tensor] = []
    calls: list[Call] = []
    called: list[str] = []
    containers: dict[int, tuple[str, Any, int]] = {}  # by address: argument, container, its first length

    def note(name: str) -> Callable[..., None]:
        def take(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = dict(kwargs)
            hidden = args[0] if args else rest.pop("hidden_states")
            if not inputs:
                inputs.append(hidden)
            calls.append(Call(args[1:], rest))
            called.append(name)
            for argument, value in rest.items():
                if isinstance(value, (dict, list)):
                    containers.setdefault(id(value), (argument, value, len(value)))
            if len(calls) == blocks < len(bundle.blocks) or len(calls) > len(bundle.blocks):
                raise Seen

        return take

    def stop(head: nn.Module, args: Any) -> None:
        raise Seen

    attached = [b.register_forward_pre_hook(note(name), with_kwargs=True) for name, b in bundle.blocks.items()]
    head = bundle.model.get_output_embeddings() if isinstance(bundle.model, PreTrainedModel) else None
    attached += [head.register_forward_pre_hook(stop)] if head is not None else []
    with hooks(attached), contextlib.suppress(Seen):
        bundle.model(input_ids=batch, use_cache=False)  # a captured cache would grow on every replay
    check_order(bundle, called, blocks)
    for argument, value, length in containers.values():
        if len(value) != length:
            raise NMBenchError(
                f"the blocks of {bundle.ref} hand results to each other in {argument!r}; it cannot be walked block by "
                f"block, choose a method that needs no statistics."
            )
    return inputs[0], calls


def check_order(bundle: Bundle, called: Sequence[str], blocks: int) -> None:
    """Raise `NMBenchError` unless the first `blocks` blocks were called once each, in order, and no other one."""
    names = list(bundle.blocks)[:blocks]
    if list(called) == names:
        return
    again = [name for number, name in enumerate(called) if name in called[:number]]
    if again:
        what = f"calls its block {again[0]} more than once"
    elif len(called) < blocks:
        what = f"calls {len(called)} of its {blocks} blocks"
    else:
        what = "does not call its blocks in order"
    raise NMBenchError(f"{bundle.ref} {what}; it cannot be walked block by block.")


def until(bundle: Bundle, index: int, batch: Tensor) -> Any:
    """What block `index` returns when the model runs on `batch`; the blocks after it are not run."""
    returned: list[Any] = []

    def note(block: nn.Module, args: Any, output: Any) -> None:
        returned.append(output)
        raise Seen

    block = list(bundle.blocks.values())[index]
    with hooks([block.register_forward_hook(note)]), contextlib.suppress(Seen):
        bundle.model(input_ids=batch, use_cache=False)
    return returned[0]


@contextlib.contextmanager
def resumed(bundle: Bundle, index: int, output: Any) -> Iterator[None]:
    """While the context is open, the model does not compute its blocks up to `index`, which returns `output`."""
    with contextlib.ExitStack() as stack:
        for block in list(bundle.blocks.values())[: index + 1]:
            stack.enter_context(instead(block, lambda *args, **kwargs: output))
        yield


def same(a: Any, b: Any, strict: bool = False) -> bool:
    """Whether two captured calls, or parts of them, are equal; objects of unknown kinds are taken as equal, or, if
    `strict`, as different unless they are one.
    """
    if isinstance(a, Call) and isinstance(b, Call):
        return same(a.args, b.args, strict) and same(dict(a.kwargs), dict(b.kwargs), strict)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, strict) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key], strict) for key in a)
    if isinstance(a, PLAIN) or isinstance(b, PLAIN):
        return type(a) is type(b) and bool(a == b)
    return not strict or a is b
