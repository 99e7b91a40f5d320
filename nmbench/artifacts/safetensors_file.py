"""Safetensors: weights, bool masks, and the packed masks of nmbench. The library checks header and offsets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from nmbench.artifacts.artifact import (
    Artifact,
    Matrix,
    Rows,
    Unreadable,
    by_layer,
    is_weight,
    layer_name,
    one_line,
    stack_size,
)
from nmbench.artifacts.bits import bool_rows
from nmbench.artifacts.mask_values import as_mask
from nmbench.errors import NMBenchError
from nmbench.pattern import Pattern
from nmbench.results.files import FORMAT

SIZES = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16}
SIZES |= {"I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64}


def read_safetensors(path: Path) -> Artifact:
    """Open a safetensors file without reading its tensors. Raises `Unreadable`."""
    with opening(path) as file:
        metadata = dict(file.metadata() or {})
        listed = {name: header_of(file, name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    if decoded(metadata.get("format", "")) == FORMAT:
        return packed_masks(path, metadata, {name: shape for name, (shape, _) in listed.items()})
    found = {
        name: Matrix(layer_name(name), (shape[0], shape[1]), is_mask(name, dtype), rows_of(path, name), SIZES[dtype])
        for name, (shape, dtype) in listed.items()
        if len(shape) == 2 and 0 not in shape and dtype in SIZES
    }
    return Artifact(
        str(path),
        "safetensors file",
        weights=by_layer(str(path), {n: m for n, m in found.items() if not m.mask and is_weight(n)}),
        masks=by_layer(str(path), {n: m for n, m in found.items() if m.mask}),
        stacked={
            f"{name}[{e}]": Matrix(f"{name}[{e}]", (shape[1], shape[2]), False, rows_of(path, name, e), SIZES[dtype])
            for name, (shape, dtype) in listed.items()
            for e in range(stack_size(shape) if dtype in SIZES else 0)
        },
        tensors={name: shape for name, (shape, _) in listed.items()},
    )


@contextmanager
def opening(path: Path) -> Iterator[Any]:
    """Open the file with the library; errors of the library, now or while reading, become `Unreadable`."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (OSError, safetensors.SafetensorError, ValueError, RuntimeError, MemoryError) as error:
        raise Unreadable(f"{path} is not a whole safetensors file: {one_line(error)}.") from error


def header_of(file: Any, name: str) -> tuple[tuple[int, ...], str]:
    entry = file.get_slice(name)
    return tuple(entry.get_shape()), str(entry.get_dtype())


def is_mask(name: str, dtype: str) -> bool:
    return dtype == "BOOL" or name.endswith("mask")


def rows_of(path: Path, name: str, expert: int | None = None) -> Any:
    """Opens one matrix of a file, or of a stack in it: rows are copied out of the mapped file when asked for."""

    def open_rows() -> Rows:
        with opening(path) as file:
            entry = file.get_slice(name)
            mask = is_mask(name, str(entry.get_dtype()))

        def read(start: int, stop: int) -> Any:
            rows = entry[start:stop] if expert is None else entry[expert, start:stop]
            return as_mask(rows, name) if mask else rows

        return read

    return open_rows


def packed_masks(path: Path, metadata: Mapping[str, str], stored: Mapping[str, tuple[int, ...]]) -> Artifact:
    """Masks written by `nmbench.results.save_masks`. Raises `Unreadable` if the metadata do not fit the tensors."""
    about = {name: decoded(value) for name, value in metadata.items()}
    layers = about.pop("layers", None)
    if not isinstance(layers, dict) or set(layers) != set(stored):
        raise Unreadable(f"{path} is damaged: its metadata and its tensors name different layers.")
    masks, patterns = {}, {}
    for name, layer in layers.items():
        shape, patterns[name] = claim(path, name, layer)
        if stored[name] != (-(-shape[0] * shape[1] // 8),):
            raise Unreadable(f"{path} is damaged: {name} has {stored[name]} bytes, not those of a mask {shape}.")
        masks[name] = Matrix(name, shape, True, packed_rows(path, name, shape[1]), 1)
    return Artifact(str(path), "packed masks", masks=masks, tensors=stored, patterns=patterns, about=about)


def claim(path: Path, name: str, layer: Any) -> tuple[tuple[int, int], Pattern]:
    """The shape and the pattern that a file claims for a layer. Raises `Unreadable` for malformed claims."""
    try:
        rows, columns = layer["shape"]
        if not all(type(size) is int and size > 0 for size in (rows, columns)):
            raise ValueError(f"shape {layer['shape']}")
        return (rows, columns), Pattern.parse(layer["pattern"])
    except (KeyError, TypeError, ValueError, AttributeError, NMBenchError) as error:
        raise Unreadable(f"{path} is damaged: its metadata for {name} hold no shape and pattern ({error}).") from error


def packed_rows(path: Path, name: str, columns: int) -> Any:
    """A function that opens one packed mask, lowest bit first."""

    def open_rows() -> Rows:
        with opening(path) as file:
            packed: np.ndarray[Any, Any] = file.get_tensor(name).numpy()
        return bool_rows(packed, columns, "little")

    return open_rows


def decoded(text: str) -> Any:
    """A metadata value: JSON if nmbench wrote it, else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
