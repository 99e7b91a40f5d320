"""Temporary hooks on modules: observe inputs and outputs, replace a forward pass, and always remove the hook."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states from the output of a block; in transformers 5 the output is the tensor itself."""
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of a module by `forward` while the context is open."""
    table = vars(module)
    before = table.get("forward")
    table["forward"] = forward
    try:
        yield
    finally:
        table.pop("forward", None)
        if before is not None:
            table["forward"] = before


class Place(NamedTuple):
    """The first input of a sub-module of a block, or its output; "" names the block itself."""

    module: str
    output: bool


class Ear(NamedTuple):
    """A hook that passes the first input of a module, or the hidden states in its output, to the callback `tell`."""

    module: nn.Module
    tell: Callable[[Tensor], None]
    output: bool = False

    @classmethod
    def at(cls, place: Place, block: nn.Module, tell: Callable[[Tensor], None]) -> Ear:
        return cls(block.get_submodule(place.module), tell, place.output)

    def attach(self) -> Any:
        if self.output:
            return self.module.register_forward_hook(lambda module, args, output: self.tell(hidden_of(output)))
        return self.module.register_forward_pre_hook(lambda module, args: self.tell(args[0]) if args else None)


@contextlib.contextmanager
def listening(ears: Iterable[Ear]) -> Iterator[None]:
    """Attach the hooks `ears` while the context is open."""
    with hooks(ear.attach() for ear in ears):
        yield


@contextlib.contextmanager
def hooks(handles: Iterable[Any]) -> Iterator[None]:
    """Remove the hooks of `handles` when the context ends, also after an exception."""
    attached = list(handles)
    try:
        yield
    finally:
        for handle in attached:
            handle.remove()
