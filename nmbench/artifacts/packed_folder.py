"""Folders of packed weights (`nmbench.runtime.packed`), read like any other checkpoint, a few rows at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nmbench.artifacts.artifact import Artifact, Matrix, Rows, Unreadable, is_weight, layer_name
from nmbench.artifacts.safetensors_file import SIZES, claim, header_of, opening, rows_of
from nmbench.errors import NMBenchError
from nmbench.pattern import Pattern
from nmbench.runtime import PackedWeight, unpack
from nmbench.runtime.packed import PACKED, description, kept_of
from nmbench.runtime.packed.weight import code_bytes, groups_of

Header = tuple[Path, tuple[int, ...], str]  # file, shape, dtype


def read_packed(folder: Path) -> Artifact:
    """Open a folder of packed weights without reading its tensors; masks are those that the codes describe.

    Raises `Unreadable` if its description and its files disagree.
    """
    try:
        about = description(folder)
    except NMBenchError as error:
        raise Unreadable(str(error)) from error
    stored = headers(folder, about)
    weights, masks, patterns, tensors = {}, {}, {}, {n: shape for n, (_, shape, _) in stored.items()}
    for name, layer in layers_in(folder, about).items():
        shape, patterns[name] = claim(folder / PACKED, name, layer)
        files = checked_parts(folder, name, shape, patterns[name], stored)
        masks[name] = Matrix(name, shape, True, opener(files, name, patterns[name], shape[1], True), 1)
        weight = Matrix(
            name, shape, False, opener(files, name, patterns[name], shape[1], False), SIZES[stored[f"{name}.values"][2]]
        )
        weights[name] = weight.transposed() if layer.get("transposed") else weight
        tensors = {n: s for n, s in tensors.items() if n not in (f"{name}.values", f"{name}.codes")}
        tensors[f"{name}.weight"] = weights[name].shape
    weights |= dense_weights(stored)
    form = "folder of packed weights"
    return Artifact(str(folder), form, weights, masks, tensors=tensors, patterns=patterns)


def headers(folder: Path, about: Mapping[str, Any]) -> dict[str, Header]:
    """File, shape and dtype of every stored tensor. Raises `Unreadable` for a file outside the folder."""
    found = {}
    files = about.get("files")
    for name in files if isinstance(files, list) else ():
        if not isinstance(name, str) or Path(name).name != name:
            raise Unreadable(f"{folder / PACKED} names {name!r}, which is not a file of the folder.")
        with opening(folder / name) as file:
            found.update({n: (folder / name, *header_of(file, n)) for n in file.keys()})  # noqa: SIM118
    return found


def layers_in(folder: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of the packed layers. Raises `Unreadable` if there are none."""
    layers = about.get("layers")
    if not isinstance(layers, dict) or not layers or not all(isinstance(layer, dict) for layer in layers.values()):
        raise Unreadable(f"{folder / PACKED} names no packed layers.")
    return layers


def checked_parts(
    folder: Path, name: str, shape: tuple[int, int], pattern: Pattern, stored: Mapping[str, Header]
) -> tuple[Path, Path]:
    """The files of the values and of the codes of a layer. Raises `Unreadable` if a shape is not that of the layer."""
    rows, inputs = shape
    wanted = {"values": groups_of(inputs, pattern) * pattern.keep, "codes": code_bytes(inputs, pattern)}
    files = []
    for part, columns in wanted.items():
        path, found, dtype = stored.get(f"{name}.{part}", (folder, (), "none"))
        if found != (rows, columns) or dtype not in SIZES or (part == "codes" and dtype != "U8"):
            raise Unreadable(f"{folder} is damaged: {name}.{part} is {dtype} {found}, expected {(rows, columns)}.")
        files.append(path)
    return files[0], files[1]


def opener(files: tuple[Path, Path], name: str, pattern: Pattern, inputs: int, mask: bool) -> Any:
    """A function that opens the weight of a packed layer, or its mask, and unpacks only the rows asked for."""

    def open_rows() -> Rows:
        read_values, read_codes = (
            rows_of(path, f"{name}.{part}")() for path, part in zip(files, ("values", "codes"), strict=True)
        )

        def read(start: int, stop: int) -> Any:
            packed = PackedWeight(read_values(start, stop), read_codes(start, stop), pattern, inputs)
            return kept_of(packed)[:, :inputs] if mask else unpack(packed)

        return read

    return open_rows


def dense_weights(stored: Mapping[str, Header]) -> dict[str, Matrix]:
    """The matrices of weights that are stored as they are, such as embeddings."""
    return {
        layer_name(name): Matrix(layer_name(name), (shape[0], shape[1]), False, rows_of(path, name), SIZES[dtype])
        for name, (path, shape, dtype) in stored.items()
        if len(shape) == 2 and 0 not in shape and dtype in SIZES and is_weight(name)
    }


def packed_bytes(folder: Path) -> tuple[int, int] | None:
    """The bytes of the packed layers of a folder, and those of the same layers if they were dense; None without any."""
    if not (folder / PACKED).is_file():
        return None
    about = description(folder)
    stored = headers(folder, about)
    packed = dense = 0
    for name, layer in layers_in(folder, about).items():
        (rows, columns), size = layer["shape"], SIZES[stored[f"{name}.values"][2]] // 8
        dense += rows * columns * size
        packed += stored[f"{name}.values"][1][1] * rows * size + stored[f"{name}.codes"][1][1] * rows
    return packed, dense
