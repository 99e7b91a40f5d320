"""The file of repaired weights: the values that the mask keeps, and other trained parameters as they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmbench.errors import NMBenchError
from nmbench.results.files import read_tensors, write_tensors

FORMAT = "nmbench kept weights 1"
OTHER = "other "  # begins the name of a parameter that is no prunable weight


def save_weights(
    path: Path,
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    about: Mapping[str, Any],
) -> int:
    """Write the kept values of `weights`, layer name -> `[out, in]`; return the bytes of the file."""
    values = {name: weight[masks[name].to(weight.device)] for name, weight in weights.items()}  # row by row
    named = {f"{OTHER}{name}": tensor for name, tensor in others.items()}
    write_tensors(path, {**values, **named}, {"format": FORMAT, **about})
    return path.stat().st_size


def load_weights(path: Path, masks: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """Return weights `[out, in]` by layer, other parameters by name, and the digest of the job that wrote the file.

    Raises `NMBenchError` for another file, and for one that does not belong to `masks`.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise NMBenchError(f"{path} does not hold weights kept by nmbench.")
    others = {name.removeprefix(OTHER): tensor for name, tensor in tensors.items() if name.startswith(OTHER)}
    weights = {name: unpacked(values, masks.get(name), path) for name, values in tensors.items() if OTHER not in name}
    return weights, others, metadata["job_digest"]


def unpacked(values: Tensor, mask: Tensor | None, path: Path) -> Tensor:
    """Return the weight `[out, in]` of kept values `[kept]`, with positive zeros off the mask."""
    if mask is None or int(mask.sum()) != values.numel():
        raise NMBenchError(f"{path} does not belong to the masks beside it; remove it and give the same command again.")
    return torch.zeros(mask.shape, dtype=values.dtype).masked_scatter_(mask.cpu(), values)
