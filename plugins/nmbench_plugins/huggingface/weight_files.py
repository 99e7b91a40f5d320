"""The files that transformers reads the weights of a folder from, and the dtypes of the tensors in them."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

WHOLE = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks for them
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
NAMES = {dtype: name for name, dtype in FLOATS.items()}


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: its name, the name of its dtype as safetensors writes it, and its number of entries."""

    name: str
    dtype: str
    size: int


def weight_files(folder: Path, named: str | None = None) -> list[Path]:
    """Return the weight files of a folder: one file, or the shards that an index names.

    `named` is the file or index that the configuration names, if it does (`transformers_weights`).
    """
    for whole in (named, *WHOLE) if named else WHOLE:
        if (folder / whole).is_file() and not whole.endswith(".json"):
            return [folder / whole]
        index = folder / (whole if whole.endswith(".json") else f"{whole}.index.json")
        if index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / name for name in dict.fromkeys(names)]
    return []


def stored_tensors(files: Iterable[Path]) -> Iterator[Stored]:
    """Yield every tensor of the files, without reading its entries."""
    for file in files:
        yield from in_safetensors(file) if file.suffix == ".safetensors" else in_torch_file(file)


def in_safetensors(file: Path) -> Iterator[Stored]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
            entry = tensors.get_slice(name)
            yield Stored(name, str(entry.get_dtype()), prod(entry.get_shape()))


def in_torch_file(file: Path) -> Iterator[Stored]:
    import torch

    from nmbench.runtime import dtype_name

    content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    if isinstance(content, Mapping):
        for name, tensor in content.items():
            if isinstance(tensor, torch.Tensor):
                dtype = dtype_name(tensor.dtype)
                yield Stored(str(name), NAMES.get(dtype, dtype), tensor.numel())


def usual_dtype(tensors: Iterable[Stored]) -> str | None:
    """Return the floating-point dtype that holds most entries, as torch names it; None if no tensor has one."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.dtype in FLOATS:
            sizes[FLOATS[tensor.dtype]] += tensor.size
    return sizes.most_common(1)[0][0] if sizes else None
