"""Files of `torch.save`: weights, or masks as bool or 0/1 tensors. Only tensors are unpickled, never code.

MaskPro writes one bool tensor a file, named by its layer; MaskLLM's raw masks are one dictionary `<name>.weight.mask`
-> 0.0 or 1.0 (their repositories woodenchild95/Maskpro and NVlabs/MaskLLM). Archives are mapped into memory and read
as needed; files of older torch versions, one pickle each, are read whole.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from nmbench.artifacts.bit_archive import BROKEN
from nmbench.artifacts.mask_values import as_mask


def read_torch(path: Path) -> Artifact:
    """Open a file of `torch.save` and list its tensors. Raises `Unreadable`."""
    found, stacked = {}, {}
    for name, tensor in tensors_of(path).items():
        check_storage(path, name, tensor)
        for e in range(stack_size(tuple(tensor.shape))):
            shape, bits = (tensor.shape[1], tensor.shape[2]), 8 * tensor.element_size()
            stacked[f"{name}[{e}]"] = Matrix(f"{name}[{e}]", shape, False, rows_of(path, name, e), bits)
        if tensor.dim() == 2 and tensor.numel():
            shape = (tensor.shape[0], tensor.shape[1])
            mask = tensor.dtype == torch.bool or name.endswith("mask")
            found[name] = Matrix(layer_name(name), shape, mask, rows_of(path, name), 8 * tensor.element_size())
    weights = {name: matrix for name, matrix in found.items() if not matrix.mask and is_weight(name)}
    masks = {name: matrix for name, matrix in found.items() if matrix.mask}
    return Artifact(
        str(path),
        "torch file",
        weights=by_layer(str(path), weights),
        masks=by_layer(str(path), masks),
        stacked=stacked,
        tensors={name: tuple(tensor.shape) for name, tensor in tensors_of(path).items()},
    )


def rows_of(path: Path, name: str, expert: int | None = None) -> Any:
    """A function that opens one matrix, or matrix `expert` of a stack.

    The file stays mapped until another file is read.
    """

    def open_rows() -> Rows:
        tensor = tensors_of(path)[name] if expert is None else tensors_of(path)[name][expert]
        if tensor.dtype == torch.bool or name.endswith("mask"):
            return lambda start, stop: as_mask(tensor[start:stop], name)
        return lambda start, stop: tensor[start:stop]

    return open_rows


def tensors_of(path: Path) -> dict[str, Tensor]:
    """All tensors of a file by name; a single tensor is named as its file. Raises `Unreadable`."""
    status = path.stat()
    return loaded(path, status.st_ino, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1)
def loaded(path: Path, *version: int) -> dict[str, Tensor]:
    """`tensors_of`, cached for one file; `version` is its inode, time and size."""
    check_zip(path)
    content = unpickled(path)
    if isinstance(content, Tensor):
        return {path.stem: content}
    if isinstance(content, Mapping):
        for table in (content, *(value for value in content.values() if isinstance(value, Mapping))):
            tensors = {name: t for name, t in table.items() if isinstance(name, str) and isinstance(t, Tensor)}
            if tensors:
                return tensors
    raise Unreadable(f"{path} holds {type(content).__name__}, neither a tensor nor a dictionary of tensors.")


def unpickled(path: Path) -> Any:
    """The content of a file of tensors and plain containers. Raises `Unreadable` for any other content."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise Unreadable(f"{path} asks for code ({code[1]}) to be run, so it was not loaded.") from error
        raise Unreadable(f"{path} is not a whole file of tensors: {one_line(error)}.") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise Unreadable(f"{path} is not a whole file of torch.save: {one_line(error)}.") from error


def check_zip(path: Path) -> None:
    """Raise `Unreadable` for an archive with compressed or overlapping entries: torch writes neither."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except BROKEN as error:
        raise Unreadable(f"{path} is not a whole file of torch.save: {one_line(error)}.") from error
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise Unreadable(f"{path} unpacks to more than it is; torch stores tensors uncompressed, so it was refused.")


def check_storage(path: Path, name: str, tensor: Tensor) -> None:
    """Raise `Unreadable` for a sparse, quantised or non-CPU tensor, or one larger than its storage."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise Unreadable(f"{name} in {path} is no plain tensor (layout {tensor.layout}, device {tensor.device}).")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise Unreadable(f"{name} in {path} claims shape {tuple(tensor.shape)}, more than the file holds of it.")
