"""SHA-256 of tensors, computed by several threads."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

PART_BYTES = 2**25  # that one thread hashes; another number makes other digests


MOST_HASHERS = 8  # threads


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, dtypes and shapes of tensors, and the SHA-256 of every `PART_BYTES` of their bytes."""
    total = hashlib.sha256()
    parts = parts_of(tensors)
    threads = min(MOST_HASHERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        while some := list(itertools.islice(parts, 4 * threads)):  # whoever interrupts does not wait for all
            digests = pool.map(part_digest, (part for _, part in some))
            for (title, _), digest in zip(some, digests, strict=True):
                total.update(title.encode())
                total.update(digest)
    return total.hexdigest()


def parts_of(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The bytes of tensors, sorted by name, in parts; the first part of each comes with what it is."""
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        tensor = tensor if tensor.is_contiguous() else tensor.cpu().contiguous()
        title = f"{name} {tensor.dtype} {tuple(tensor.shape)};"
        for part in tensor.reshape(-1).view(torch.uint8).split(PART_BYTES):
            yield title, part
            title = ""


def part_digest(numbers: Tensor) -> bytes:
    return hashlib.sha256(numbers.cpu().numpy().data).digest()
