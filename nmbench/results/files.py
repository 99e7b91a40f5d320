"""Files that survive a kill: written under a temporary name, fsynced, renamed. Packed masks and checkpoints."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from nmbench.errors import CannotWrite, NMBenchError
from nmbench.pattern import Pattern
from nmbench.results.header import sort_metadata
from nmbench.results.nested_state import flattened, nested
from nmbench.results.sums import SUMS, sums
from nmbench.runtime.packed.bits import packed_bits, unpacked_bits

FORMAT = "nmbench packed masks 1"


def write_atomic(path: Path, content: bytes) -> None:
    """Replace the file `path` in one step. Raises `CannotWrite` if the disk refuses; the old file stays."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Open a temporary path to write, whose file replaces `path` when the file is whole and on disk.

    Raises `CannotWrite` if the disk refuses. After `CannotWrite` or any other exception the old file is unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # mkstemp would hide the file from others
        try:
            temporary.touch()
            usual = temporary.stat().st_mode  # some libraries write files that others cannot read
            yield temporary
            temporary.chmod(usual)
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise cannot_write(path, error) from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a power cut may undo a rename that only the file system's cache knows."""
    if os.name == "nt":  # folders cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def notice(text: str) -> None:
    """Print a notice on standard error, below the line of the progress."""
    start = "\n" if sys.stderr.isatty() else ""
    print(f"{start}NOTICE {text}", file=sys.stderr, flush=True)


def cannot_write(path: Path, error: Exception) -> CannotWrite:
    """Return the error for a full disk, a read-only folder, or a path that is a file, as one line."""
    reason = getattr(error, "strerror", None) or error
    return CannotWrite(
        f"cannot write {path}: {reason}. Nothing finished is lost; mend that and give the same command again."
    )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata, with checksums, as one safetensors file, atomically. Raises `CannotWrite`."""
    ready = {name: on_host(tensor.detach()) for name, tensor in tensors.items()}
    about = {name: json.dumps(value) for name, value in {**metadata, SUMS: sums(ready, metadata)}.items()}
    with replacing(path) as temporary:
        try:
            safetensors.torch.save_file(ready, temporary, about)  # straight from memory: no second copy
        except safetensors.SafetensorError as error:
            raise cannot_write(path, error) from error
        sort_metadata(temporary)


def on_host(tensor: Tensor) -> Tensor:
    """Return a contiguous copy in host memory; safetensors refuses tensors that share memory."""
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and metadata written by `write_tensors`.

    Raises `NMBenchError` for any other file, and for one whose content does not have its checksums.
    """
    tensors, metadata = content_of(path)
    known = metadata.pop(SUMS, None)  # files of earlier versions have none
    if known is not None and known != sums(tensors, metadata):
        raise NMBenchError(f"cannot read {path}: it is damaged. Remove it and run again to make it anew.")
    return tensors, metadata


def content_of(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and metadata of a safetensors file whose metadata are JSON, unchecked."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            return tensors, {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
    except (OSError, safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise NMBenchError(f"cannot read {path}: {error}. Remove it and run again to make it anew.") from error


def pack(mask: Tensor) -> Tensor:
    """Return the bits of a bool mask, row by row, lowest bit first: uint8 `[ceil(numel / 8)]` on the mask's device."""
    return packed_bits(mask.reshape(1, -1))[0]


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the mask of packed bits, the inverse of `pack`: bool `shape` on the device of the bits.

    Raises `NMBenchError` if the number of bytes does not fit the shape.
    """
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.numel() != (count + 7) // 8:
        raise NMBenchError(f"a packed mask of shape {tuple(shape)} has {(count + 7) // 8} bytes, not {packed.numel()}.")
    return unpacked_bits(packed[None], count).reshape(shape)


def save_masks(
    path: Path, masks: Mapping[str, Tensor], patterns: Mapping[str, Pattern], about: Mapping[str, Any]
) -> None:
    """Write bit-packed masks with shapes and patterns in the metadata; `about` holds the origin of the masks."""
    layers = {name: {"shape": list(mask.shape), "pattern": str(patterns[name])} for name, mask in masks.items()}
    write_tensors(
        path, {name: pack(mask) for name, mask in masks.items()}, {"format": FORMAT, "layers": layers, **about}
    )


def load_masks(path: Path) -> dict[str, Tensor]:
    """Return masks written by `save_masks`: layer name -> bool `[out, in]`. Raises `NMBenchError` for other files."""
    tensors, metadata = packed_masks(path)
    return {name: unpack(tensors[name], tuple(layer["shape"])) for name, layer in metadata["layers"].items()}


def packed_masks(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the packed bits of every layer, uint8 `[bytes]`, and the metadata of a file of `save_masks`.

    Raises `NMBenchError` for other files.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise NMBenchError(f"{path} does not hold masks packed by nmbench.")
    return tensors, metadata


class FileCheckpoints:
    """The checkpoint of one job in one file.

    A checkpoint of another `job_digest`, hence other options, is ignored; a damaged one is too, with a notice.
    """

    def __init__(self, path: Path, job_digest: str) -> None:
        self.path = path
        self.job_digest = job_digest

    def save(self, state: Mapping[str, Any]) -> None:
        """Store tensors and JSON values, in lists and mappings of any depth; returns when they are durable."""
        tensors, plain = flattened(state)
        write_tensors(self.path, tensors, {"job_digest": self.job_digest, "plain": plain})

    def load(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        try:
            tensors, metadata = read_tensors(self.path)
        except NMBenchError as error:
            notice(f"{error} Its work is done again.")
            return None
        if metadata.get("job_digest") != self.job_digest:
            return None
        return {**tensors, **nested(metadata["plain"], tensors)}

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)


class MemoryCheckpoints:
    """Checkpoints of a learner outside a run directory, kept in memory until the process ends."""

    def __init__(self) -> None:
        self.state: dict[str, Any] | None = None

    def save(self, state: Mapping[str, Any]) -> None:
        self.state = copy.deepcopy(dict(state))  # a snapshot, because the learner may change the tensors after the call

    def load(self) -> dict[str, Any] | None:
        return copy.deepcopy(self.state)
