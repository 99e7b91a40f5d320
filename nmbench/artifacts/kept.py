"""What an artifact keeps: its masks or, where it has none, the non-zeros of its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nmbench.artifacts.counting import nonzeros
from nmbench.artifacts.decoder import scope_of
from nmbench.artifacts.matrix import Artifact, Matrix, Rows, Unreadable
from nmbench.pattern import Pattern


@dataclass(frozen=True)
class Kept:
    """Bool matrices by layer, in canonical view. With `weights`, they are the non-zeros of those, so that a kept weight
    that is zero is missing from them.
    """

    path: str
    matrices: Mapping[str, Matrix]
    weights: Mapping[str, Matrix]
    patterns: Mapping[str, Pattern]


def kept_of(artifact: Artifact) -> Kept:
    """Masks of an artifact, or the non-zeros of its decoder layers. Raises `Unreadable` if it has neither."""
    weights = {} if artifact.masks else scope_of(artifact).weights
    matrices = artifact.masks or {name: nonzero_matrix(weight) for name, weight in weights.items()}
    if not matrices:
        raise Unreadable(f"{artifact.path} holds no mask and no matrix of decoder weights.")
    return Kept(artifact.path, matrices, weights, artifact.patterns)


def nonzero_matrix(weight: Matrix) -> Matrix:
    """Where a weight is not zero, read as the weight is."""

    def open_nonzeros() -> Rows:
        read = weight.open()
        return lambda start, stop: torch.from_numpy(nonzeros(read(start, stop)).kept)

    return dataclasses.replace(weight, mask=True, open=open_nonzeros)
