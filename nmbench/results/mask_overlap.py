"""How much the masks of rows have in common, counted as packed bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nmbench.errors import NMBenchError
from nmbench.results.files import packed_masks

ONES = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.uint8)  # bits set in a byte


def mask_overlap(paths: Sequence[Path]) -> Tensor:
    """Return the share of weights kept by both masks among those that the first keeps: float64 `[files, files]`.

    `paths`: files of packed masks of the same layers (`save_masks`). The bits are counted as they are packed. Raises
    `NMBenchError` for other files, and for masks of other layers or shapes.
    """
    masks = [packed_masks(path)[0] for path in paths]
    both = torch.zeros(len(paths), len(paths), dtype=torch.float64)
    for first, ours in enumerate(masks):
        for second, theirs in enumerate(masks[: first + 1]):
            refuse_unlike(ours, theirs, paths[first], paths[second])
            count = sum(ones(bits & theirs[name]) for name, bits in ours.items())
            both[first, second] = both[second, first] = count
    return both / both.diagonal()[:, None].clamp(min=1)


def differing_bits(first: Path, second: Path) -> float:
    """Return the share of weights that only one of two masks keeps. Raises `NMBenchError` as `mask_overlap` does."""
    (ours, about), (theirs, _) = packed_masks(first), packed_masks(second)
    refuse_unlike(ours, theirs, first, second)
    weights = sum(math.prod(layer["shape"]) for layer in about["layers"].values())
    return sum(ones(bits ^ theirs[name]) for name, bits in ours.items()) / weights


def refuse_unlike(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], first: Path, second: Path) -> None:
    """Raise `NMBenchError` for masks of other layers or shapes."""
    if {name: bits.shape for name, bits in ours.items()} != {name: bits.shape for name, bits in theirs.items()}:
        raise NMBenchError(f"the masks of {first} and {second} are of other layers.")


def ones(packed: Tensor) -> int:
    """Return the number of set bits of packed bits `[bytes]`."""
    return int(ONES[packed.long()].sum())
