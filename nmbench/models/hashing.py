"""The SHA-256 of tensors, computed by several threads where it takes long."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

PART_BYTES = 2**25  # hashed by one thread at a time; another number gives other digests
MOST_THREADS = 8
THREADED_BYTES = 2**20  # less is hashed sooner than threads start
ODD = 0x1E3779B97F4A7C15  # products with consecutive numbers differ in all bits


def tensors_digest(
    tensors: Mapping[str, Tensor], part_bytes: int = PART_BYTES, done: Callable[[Tensor], None] = lambda part: None
) -> str:
    """Return the SHA-256 over the names, dtypes and shapes of tensors and the SHA-256 of every `part_bytes` of each.

    `done` is called with each part, uint8 `[bytes]`, that was hashed.
    """
    total = hashlib.sha256()
    parts = parts_of(tensors, part_bytes)
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        while batch := list(itertools.islice(parts, 4 * threads)):  # in batches, so that Ctrl-C is answered soon
            few = sum(part.numel() for _, part in batch) < THREADED_BYTES
            digests = (map if few else pool.map)(part_digest, [part for _, part in batch])
            for (header, part), digest in zip(batch, digests, strict=True):
                total.update(header.encode())
                total.update(digest)
                done(part)
    return total.hexdigest()


def parts_of(tensors: Mapping[str, Tensor], part_bytes: int) -> Iterator[tuple[str, Tensor]]:
    """Yield header and bytes (uint8) of each part, tensors sorted by name.

    The header of a tensor's first part is the name, dtype and shape; the other headers are empty.
    """
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        tensor = tensor if tensor.is_contiguous() else tensor.cpu().contiguous()
        header = f"{name} {tensor.dtype} {tuple(tensor.shape)};"
        for part in tensor.reshape(-1).view(torch.uint8).split(part_bytes):
            yield header, part
            header = ""


def masks_checksum(masks: Mapping[str, Tensor]) -> str:
    """Return a checksum of bool masks, 16 hex digits, computed where they are; one value is read back.

    Two copies of a mask are compared much faster than by SHA-256. Chance alone hides no difference, intent could.
    """
    total = sum(mask_sum(masks[name]) * (2 * number + 1) for number, name in enumerate(sorted(masks)))
    return f"{int(total) % 2**64:016x}"


def mask_sum(mask: Tensor) -> Tensor:
    """Return the sum of eight weights at a time, as one integer, times an odd number for their place: int64, scalar."""
    bits = mask.new_zeros(-(-mask.numel() // 8) * 8)  # a copy: a view may begin between two words
    bits[: mask.numel()] = mask.reshape(-1)
    words = bits.view(torch.int64)
    return (words * (torch.arange(len(words), device=mask.device) * ODD | 1)).sum()


def part_digest(part: Tensor) -> bytes:
    return hashlib.sha256(part.cpu().numpy().data).digest()
