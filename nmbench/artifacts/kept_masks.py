"""The kept weights of an artifact: its masks or, without masks, the non-zeros of its weights."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmbench.artifacts.artifact import Artifact, Matrix, Rows, Unreadable, layer_name
from nmbench.artifacts.decoder_scope import Names, renamed, scope_of, skeleton_of
from nmbench.artifacts.folder import MASKS
from nmbench.artifacts.group_counts import nonzeros
from nmbench.artifacts.joining import joined
from nmbench.artifacts.reading import open_artifact, row_masks
from nmbench.errors import NMBenchError
from nmbench.pattern import Pattern

PARTS = (".safetensors", ".bin", ".pt", ".json")  # files of a folder that hold or describe weights
CHUNK = 2**24  # bytes
LONGEST_NAME = 200  # characters


@dataclass(frozen=True)
class Kept:
    """Masks by layer, bool, in the canonical view `[out, in]`, with the weights of the same file, if it has any.

    `at_most` marks masks that are the non-zeros of weights: a kept weight that is zero counts as dropped. `base_model`
    is the model that the masks were made for, if the file says so.
    """

    path: str
    form: str
    matrices: Mapping[str, Matrix]
    weights: Mapping[str, Matrix]
    patterns: Mapping[str, Pattern]
    at_most: bool = False
    base_model: str | None = None

    @cached_property
    def names(self) -> Names:
        return Names(self.matrices)

    def named(self, parameter: Callable[[str], str]) -> Kept:
        """The same masks under the names that `parameter` gives to stored names, `model.layers.0.mlp.up_proj.weight`.

        For files without a configuration beside them, whose names may not be those of the model's modules.
        """

        def renamed(table: Mapping[str, Any]) -> dict[str, Any]:
            return {layer_name(parameter(f"{name}.weight")): value for name, value in table.items()}

        return dataclasses.replace(
            self, matrices=renamed(self.matrices), weights=renamed(self.weights), patterns=renamed(self.patterns)
        )

    def of_layer(self, name: str, shape: tuple[int, int]) -> Matrix:
        """The mask of layer `name` of a model. Raises `NMBenchError` for a missing mask or one not of `shape`."""
        found = self.names.find(name)
        if found is None:
            example = next(iter(self.matrices))
            raise NMBenchError(f"{self.path} has no mask for layer {name} of the model; its names look like {example}.")
        matrix = self.matrices[found].shaped(shape)
        if matrix.shape != shape:
            raise NMBenchError(
                f"layer {name} has shape {shape} in the model but {matrix.shape} in {self.path}; that is another model."
            )
        return matrix

    def weight_of(self, name: str) -> Tensor:
        """The weight `[out, in]` of layer `name`. Raises `NMBenchError` if the artifact has no such weight."""
        found = Names(self.weights).find(name)
        if found is None:
            raise NMBenchError(f"{self.path} has no weights for layer {name} of the model.")
        return self.weights[found].whole()

    def others(self, names: Iterable[str]) -> list[str]:
        """The layers with a mask that are not among `names`."""
        known = Names(names)
        return [name for name in self.matrices if known.find(name) is None]


def open_masks(ref: str) -> Kept:
    """The kept weights of a checkpoint or mask file; `ref` is a path or RUN_DIRECTORY:LABEL, as for `nmbench validate`.

    Reads headers only. Raises `Unreadable`.
    """
    return kept_of(open_artifact(ref))


def kept_of(artifact: Artifact) -> Kept:
    """The masks of an artifact, or the non-zeros of its decoder layers. Raises `Unreadable` if it has neither."""
    skeleton = skeleton_of(artifact.config, len(artifact.tensors))
    artifact = joined(renamed(artifact, skeleton), skeleton)
    weights = scope_of(artifact, skeleton).weights
    matrices = artifact.masks or {name: nonzero_matrix(weight) for name, weight in weights.items()}
    if not matrices:
        raise Unreadable(f"{artifact.path} holds no mask and no matrix of decoder weights.")
    at_most = artifact.at_most or not artifact.masks
    return Kept(artifact.path, artifact.form, matrices, weights, artifact.patterns, at_most, base_model(artifact))


def base_model(artifact: Artifact) -> str | None:
    """The model that a file of masks names as its own, None for a text that is too long or not printable."""
    name = artifact.about.get("base_model")
    return name if isinstance(name, str) and name.isprintable() and len(name) <= LONGEST_NAME else None


def nonzero_matrix(weight: Matrix) -> Matrix:
    """The mask of a weight's non-zeros, read a few rows at a time, as the weight is."""

    def open_nonzeros() -> Rows:
        read = weight.open()
        return lambda start, stop: torch.from_numpy(nonzeros(read(start, stop)).kept)

    return dataclasses.replace(weight, mask=True, open=open_nonzeros)


def files_digest(ref: str) -> str:
    """SHA-256, 16 hex digits, over the files of `ref`. Raises `Unreadable` if `ref` does not exist."""
    path = Path(ref)
    if not path.exists():
        path = row_masks(ref) or path
    if not path.exists():
        raise Unreadable(f"{ref} does not exist.")
    files = [path]
    if path.is_dir():
        files = [file for file in (*sorted(path.iterdir()), path / MASKS) if file.suffix in PARTS and file.is_file()]
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name} {file_digest(file)};".encode())
    return total.hexdigest()[:16]


def file_digest(path: Path) -> str:
    """SHA-256 of one file; cached until the file changes in inode, time or size."""
    status = path.stat()
    return _digest(path, status.st_ino, status.st_mtime_ns, status.st_size)


@lru_cache
def _digest(path: Path, *version: int) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            total.update(chunk)
    return total.hexdigest()
