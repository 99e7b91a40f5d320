"""Tensors inside the arguments of a block: in lists, tuples and dicts, of any depth."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors inside a value, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(part)


def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The value in containers of its own, with `change` of every tensor; objects of other kinds as they are."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        own = copy.copy(value)
        for key, part in value.items():
            own[key] = changed(part, change)
        return own
    if isinstance(value, (list, tuple)):
        parts = [changed(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def arranged(value: Any) -> Any:
    """Which objects are where in a value; two arrangements are equal if no container was changed in between."""
    if isinstance(value, dict):
        return {key: arranged(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [arranged(part) for part in value]
    return id(value)
