"""From a path to an `Artifact`: the first bytes of a file decide on its format, not its name."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nmbench.artifacts.artifact import Artifact, Unreadable, one_line
from nmbench.artifacts.bit_archive import BROKEN, read_bit_archive
from nmbench.artifacts.folder import read_folder
from nmbench.artifacts.safetensors_file import read_safetensors
from nmbench.artifacts.torch_file import read_torch
from nmbench.errors import did_you_mean
from nmbench.results.address import FORM, address_of, parts_of, shown

BITMASK = ".bitmask"  # ends the name of a tensor in which compressed-tensors packs the places of non-zeros
KNOWN = f"safetensors, torch.save, .npz of packed bits, a transformers folder, a folder of masks, or {FORM}"


def open_artifact(ref: str) -> Artifact:
    """Open a checkpoint or masks: a path, or `RUN_DIRECTORY:LABEL` for the masks of a row. Reads headers only.

    Raises `Unreadable` if the file does not exist, is damaged or has an unknown format.
    """
    artifact = opened(ref)
    if odd := [name for name in artifact.tensors if not name.isprintable()]:
        raise Unreadable(f"{artifact.path} has a tensor named {odd[0]!r}; such names are not printed.")
    if packed := next((name for name in artifact.tensors if name.endswith(BITMASK)), None):
        raise Unreadable(
            f"{artifact.path} stores {packed.removesuffix(BITMASK)} and perhaps others as bitmasks of "
            f"compressed-tensors, without zeros; save it decompressed (format 'dense') and give that folder."
        )
    return artifact


def opened(ref: str) -> Artifact:
    """The artifact at a path, or the masks of a row of a run directory."""
    path = Path(ref)
    if not path.exists() and (row := row_masks(ref)):
        return read_safetensors(row)
    if path.is_dir():
        return read_folder(path)
    if not path.is_file():
        raise Unreadable(f"{ref} does not exist; expected {KNOWN}.")
    artifact = reader_of(path)(path)
    config = path.parent / "config.json"  # the file may be a shard of a transformers folder
    return dataclasses.replace(artifact, config=config) if artifact.weights and config.is_file() else artifact


def reader_of(path: Path) -> Callable[[Path], Artifact]:
    """The reader for a file, by its first bytes. Raises `Unreadable` for an unknown format."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
        names = names_in(path) if head.startswith(b"PK") else []
    except BROKEN as error:
        raise Unreadable(f"{path} cannot be read: {one_line(error)}.") from error
    if any(name.endswith("data.pkl") for name in names):
        return read_torch
    if names:
        return read_bit_archive
    if head[8:] == b"{":
        return read_safetensors
    if head.startswith(b"\x80"):
        return read_torch
    raise Unreadable(f"{path} is of no known format; expected {KNOWN}.")


def names_in(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def row_masks(ref: str) -> Path | None:
    """The mask file of the row that an address names, `DIR:LABEL:2:4:0` for example; None if `DIR` is no run directory.

    Raises `Unreadable` if no row with masks, or more than one, has that address.
    """
    address = address_of(ref)
    if address is None:
        return None
    files = {path: row for path in sorted((address.directory / "masks").glob("*.safetensors")) if (row := row_of(path))}
    named = [path for path, row in files.items() if address.names(**row)]
    if len(named) != 1:
        problem = "several rows" if named else "no row"
        listed = ", ".join(shown(**files[path]) for path in named or files) or "none"
        wanted = shown(address.label or "", address.pattern, address.seed)
        near = "" if named else did_you_mean(wanted, [shown(**row) for row in files.values()])
        raise Unreadable(f"{address.directory} has {problem} named {wanted!r}.{near} Rows: {listed}.")
    return named[0]


def row_of(path: Path) -> Mapping[str, Any] | None:
    """Label, pattern and seed of the row of a mask file, None for a file of another name."""
    found = parts_of(path.stem)
    return found if found and found["pattern"] else None
