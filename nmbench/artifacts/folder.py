"""Folders: transformers checkpoints, whole or in shards; masks with one file for every layer; exports of nmbench."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from nmbench.artifacts.artifact import Artifact, Unreadable, layer_name, one_line
from nmbench.artifacts.packed_folder import read_packed
from nmbench.artifacts.safetensors_file import read_safetensors
from nmbench.artifacts.torch_file import read_torch
from nmbench.runtime.packed import PACKED

MASKS = Path("nmbench") / "masks.safetensors"  # a subfolder: loaders read *.safetensors of the folder as weights
WHOLE = {"model.safetensors": read_safetensors, "pytorch_model.bin": read_torch}
LARGEST_JSON = 2**27


def read_folder(folder: Path) -> Artifact:
    """Open a folder by the files in it.

    Raises `Unreadable` for a folder of no known kind, and for a run directory, naming its rows.
    """
    if (folder / "records.jsonl").is_file():
        rows = sorted(path.stem for path in (folder / "masks").glob("*.safetensors"))
        raise Unreadable(f"{folder} is a run directory; name a row of it: {', '.join(f'{folder}:{r}' for r in rows)}.")
    if (folder / PACKED).is_file():
        return with_provenance(folder, read_packed(folder))
    for name, reader in WHOLE.items():
        if (folder / f"{name}.index.json").is_file():
            return with_masks(folder, sharded(folder, name))
        if (folder / name).is_file():
            whole = dataclasses.replace(reader(folder / name), path=str(folder), form=f"folder with {name}")
            return with_masks(folder, whole)
    files = sorted(folder.glob("*.pt"))
    if files:
        return mask_files(folder, files)
    raise Unreadable(f"{folder} holds neither {', nor '.join(WHOLE)}, nor an index of shards, nor masks in .pt files.")


def sharded(folder: Path, name: str) -> Artifact:
    """All shards that an index names, as one artifact. Raises `Unreadable` if index and shards disagree."""
    index = folder / f"{name}.index.json"
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise Unreadable(f"{index} has no weight_map of tensor names to files.")
    shards = []
    for file in dict.fromkeys(names.values()):
        if Path(file).name != file or "\\" in file or not (folder / file).is_file():
            raise Unreadable(f"{index} names {file!r}, which is not a file of {folder}.")
        shard = WHOLE[name](folder / file)
        listed = {tensor for tensor, where in names.items() if where == file}
        if differing := sorted(listed ^ set(shard.tensors)):
            raise Unreadable(f"{index} and {file} disagree on where {differing[0]} is ({len(differing)} such tensors).")
        shards.append(shard)
    return joined(folder, f"folder with {len(shards)} shards of {name}", shards)


def joined(folder: Path, form: str, parts: list[Artifact]) -> Artifact:
    """Several files as one artifact. Raises `Unreadable` if two hold the same tensor."""
    tables: dict[str, dict[str, Any]] = {"weights": {}, "masks": {}, "stacked": {}, "tensors": {}}
    for part in parts:
        for kind, table in tables.items():
            for name, value in getattr(part, kind).items():
                if name in table:
                    raise Unreadable(f"two files of {folder} hold {name}.")
                table[name] = value
    return Artifact(str(folder), form, tables["weights"], tables["masks"], tables["stacked"], tables["tensors"])


def with_masks(folder: Path, weights: Artifact) -> Artifact:
    """A checkpoint with its configuration and, in an export, the packed masks."""
    config = folder / "config.json"
    weights = dataclasses.replace(weights, config=config if config.is_file() else None)
    if not (folder / MASKS).is_file():
        return weights
    packed = read_safetensors(folder / MASKS)
    if weights.masks:
        raise Unreadable(f"{folder} holds masks both beside and among its weights.")
    form = f"{weights.form}, and packed masks"
    return dataclasses.replace(weights, form=form, masks=packed.masks, patterns=packed.patterns, about=packed.about)


def with_provenance(folder: Path, packed: Artifact) -> Artifact:
    """Packed weights with their configuration and the metadata of the mask file beside them."""
    config = folder / "config.json"
    about = read_safetensors(folder / MASKS).about if (folder / MASKS).is_file() else {}
    return dataclasses.replace(packed, config=config if config.is_file() else None, about=about)


def mask_files(folder: Path, files: list[Path]) -> Artifact:
    """A folder of files `<layer>.pt` with one mask in each. Raises `Unreadable` for any other file."""
    parts = []
    for file in files:
        part = read_torch(file)
        if set(map(layer_name, part.tensors)) != {file.stem} or not part.masks:
            raise Unreadable(f"{file} is not the mask of one layer: expected one bool matrix, named as the file.")
        parts.append(part)
    return joined(folder, f"folder of {len(files)} mask files", parts)


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises `Unreadable` if it is not JSON or larger than `LARGEST_JSON` bytes."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise Unreadable(f"{path} has {path.stat().st_size} bytes; such a file has a few thousand.")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise Unreadable(f"{path} is not JSON: {one_line(error)}.") from error
