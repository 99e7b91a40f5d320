"""Tensors put together for an exchange: many small messages cost more than a copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BUCKET_BYTES = 2**26  # that are added up at once


def buckets(tensors: Sequence[Tensor], most_bytes: int = BUCKET_BYTES) -> Iterator[list[Tensor]]:
    """Yield the tensors in their order, as many of one dtype at a time as have `most_bytes`, at least one."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        size = sum(one.nbytes for one in bucket) + tensor.nbytes
        if bucket and (size > most_bytes or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
