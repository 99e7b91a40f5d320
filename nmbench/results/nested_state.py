"""A learner's state, tensors inside lists and mappings of any depth, as named tensors and plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

TENSOR, TUPLE, PAIRS = "@tensor", "@tuple", "@pairs"  # keys of what JSON cannot hold


def flattened(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and plain JSON values with references to those tensors; a top-level tensor keeps its name."""
    tensors: dict[str, Tensor] = {}
    plain = {name: plain_of(value, name, tensors) for name, value in state.items()}
    return tensors, plain


def plain_of(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors put into `tensors` under names that begin with `path`."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {TENSOR: path}
    if isinstance(value, Mapping):
        items = [(key, plain_of(inner, f"{path}/{key}", tensors)) for key, inner in value.items()]
        if all(isinstance(key, str) and not key.startswith("@") for key, _ in items):
            return dict(items)
        return {PAIRS: [[key, inner] for key, inner in items]}  # keys such as the numbers of an optimiser's parameters
    if isinstance(value, (list, tuple)):
        listed = [plain_of(inner, f"{path}/{index}", tensors) for index, inner in enumerate(value)]
        return {TUPLE: listed} if isinstance(value, tuple) else listed
    return value


def nested(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `flattened`."""
    if isinstance(plain, list):
        return [nested(inner, tensors) for inner in plain]
    if not isinstance(plain, Mapping):
        return plain
    if TENSOR in plain:
        return tensors[plain[TENSOR]]
    if TUPLE in plain:
        return tuple(nested(inner, tensors) for inner in plain[TUPLE])
    if PAIRS in plain:
        return {key: nested(inner, tensors) for key, inner in plain[PAIRS]}
    return {key: nested(inner, tensors) for key, inner in plain.items()}
