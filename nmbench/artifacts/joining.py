"""Layers that a file stores in several tensors, as one matrix for every expert; read as transformers joins them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nmbench.artifacts.artifact import Artifact, Matrix, Rows, is_weight, layer_name

if TYPE_CHECKING:
    from nmbench.artifacts.decoder_scope import Skeleton
    from nmbench.models.stored_names import Parts, StoredNames


def joined(artifact: Artifact, skeleton: Skeleton | None) -> Artifact:
    """The artifact with the parameters of the model in place of the matrices that they are stored in.

    Nothing is read before a matrix is opened; then its whole parameter is read, and kept until the next one is.
    """
    if skeleton is None or skeleton.names is None or artifact.masks:
        return artifact
    weights, stacked, tensors = dict(artifact.weights), dict(artifact.stacked), dict(artifact.tensors)
    split = {}
    for parts in skeleton.names.parts(tensors):
        if not parts.plain and all(layer_name(stored) in weights for stored in parts.sources):
            split[parts.target] = parts
    read = reader_of(skeleton.names, split, artifact.weights)
    for parts in split.values():
        shapes = shapes_of(skeleton.names, parts, tensors)
        bits = artifact.weights[layer_name(next(iter(parts.sources)))].bits
        for stored in parts.sources:
            del weights[layer_name(stored)], tensors[stored]
        for name, shape in shapes.items():
            tensors[name] = shape
            found = {m.name: m for m in matrices(name, shape, bits, opener(read, parts.target, name))}
            (stacked if len(shape) == 3 else weights).update(found)
    return replace(artifact, weights=weights, stacked=stacked, tensors=tensors)


def shapes_of(names: StoredNames, parts: Parts, tensors: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter that `parts` make up, found without reading them."""
    values = names.read(parts, lambda stored: torch.empty(tensors[stored], device="meta"))
    return {name: tuple(value.shape) for name, value in values}


Reader = Callable[[str], Mapping[str, Tensor]]  # target of the parts -> parameters by name


def reader_of(names: StoredNames, split: Mapping[str, Parts], weights: Mapping[str, Matrix]) -> Reader:
    """A function that reads the parameters of one target; it keeps the last ones."""

    @lru_cache(maxsize=1)
    def read(target: str) -> Mapping[str, Tensor]:
        return dict(names.read(split[target], lambda stored: weights[layer_name(stored)].whole()))

    return read


def opener(read: Reader, target: str, name: str) -> Callable[[], Tensor]:
    return lambda: read(target)[name]


def matrices(name: str, shape: tuple[int, ...], bits: int, tensor: Callable[[], Tensor]) -> Iterator[Matrix]:
    """The matrix of a parameter, or every matrix of a stack of experts; none for another number of dimensions."""
    if len(shape) not in (2, 3) or not math.prod(shape):
        return

    def open_rows(expert: int | None) -> Callable[[], Rows]:
        def opened() -> Rows:
            whole = tensor() if expert is None else tensor()[expert]
            return lambda start, stop: whole[start:stop]

        return opened

    size = (shape[-2], shape[-1])
    if len(shape) == 2:
        yield Matrix(layer_name(name) if is_weight(name) else name, size, False, open_rows(None), bits)
        return
    for expert in range(shape[0]):
        yield Matrix(f"{name}[{expert}]", size, False, open_rows(expert), bits)
