"""Temporary hooks on modules: observe inputs and outputs, replace a forward pass, and always remove the hook."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn


def hidden_of(values: Any) -> Any:
    """The hidden states among the values that a module returns: the first tensor of a tuple, list or dict."""
    parts = values.values() if isinstance(values, dict) else values if isinstance(values, (list, tuple)) else ()
    return next((part for part in parts if isinstance(part, Tensor)), None if parts else values)


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
    """The inputs of a sub-module of a block, or its output; "" names the block itself."""

    module: str
    output: bool


class Observer(NamedTuple):
    """Calls `callback` with the first argument of a module, or with the hidden states that the module returns."""

    module: nn.Module
    callback: Callable[[Tensor], None]
    output: bool = False

    @classmethod
    def at(cls, place: Place, block: nn.Module, callback: Callable[[Tensor], None]) -> Observer:
        return cls(block.get_submodule(place.module), callback, place.output)

    def attach(self) -> Any:
        if self.output:
            return self.module.register_forward_hook(lambda module, args, output: self.callback(hidden_of(output)))
        return self.module.register_forward_pre_hook(self._given, with_kwargs=True)

    def _given(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if args or kwargs:
            self.callback(args[0] if args else next(iter(kwargs.values())))


@contextlib.contextmanager
def observing(observers: Iterable[Observer]) -> Iterator[None]:
    """While the context is open, the hooks of the observers are attached."""
    with hooks(observer.attach() for observer in observers):
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
