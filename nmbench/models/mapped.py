"""Tensors that are views of mapped files: they take memory only from the time they are read until they are released."""

from __future__ import annotations

import bisect
import io
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import finalize, ref

import torch
from torch import Tensor

from nmbench.errors import ModelChanged
from nmbench.models.bit_equality import as_bytes
from nmbench.models.temporary import ALIGNED, Filling, temporary_mapping

MEMORY = Path("/proc/self/smaps")  # the mappings of this process, on Linux


@dataclass(frozen=True)
class Place:
    """Where the bytes of a tensor lie: in the file `path` from `offset` on."""

    path: Path
    offset: int


@dataclass(frozen=True)
class Pristine:
    """A mapping of a file, of the addresses `begin` to `end`, none of whose bytes this process has changed."""

    begin: int
    end: int
    file: Place

    def place(self, tensor: Tensor) -> Place | None:
        """Return where a contiguous tensor lies in the file; None if it is not, or not wholly, in this mapping."""
        at = tensor.data_ptr()
        if not tensor.is_contiguous() or at < self.begin or at + tensor.nbytes > self.end:
            return None
        return Place(self.file.path, self.file.offset + at - self.begin)


def pristine_mappings(entries: Path = MEMORY) -> list[Pristine]:
    """Return the mappings of files as they are on disk, from `entries` in the format of Linux; elsewhere none."""
    if not entries.exists():
        return []
    found: list[Pristine] = []
    for line in entries.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields = line.split(None, 5)
        if not fields[0].endswith(":"):
            begin, end = (int(address, 16) for address in fields[0].split("-"))
            path = Path(fields[5]) if len(fields) == 6 else Path()
            found.append(Pristine(begin, end, Place(path, int(fields[2], 16))))
        elif fields[0] in ("Anonymous:", "Swap:") and int(fields[1]):  # kB of pages that were written to
            found[-1] = Pristine(0, 0, found[-1].file)
    return [mapping for mapping in found if mapping.end and mapping.file.path.is_file()]


def places(tensors: Iterable[Tensor]) -> Iterator[Place | None]:
    """Yield where each tensor lies in a file that it is an unchanged mapping of, as loaded safetensors are."""
    mappings = sorted(pristine_mappings(), key=lambda mapping: mapping.begin)
    begins = [mapping.begin for mapping in mappings]
    for tensor in tensors:
        index = bisect.bisect_right(begins, tensor.data_ptr()) - 1
        yield mappings[index].place(tensor) if index >= 0 else None


@dataclass(frozen=True)
class Opened:
    """A file of the model, its mapping, and what it was when it was opened."""

    file: io.FileIO
    mapped: mmap.mmap
    state: tuple[int, ...]


class Maps:
    """Open mappings, each of which lives as long as a tensor that is a view of it."""

    def __init__(self) -> None:
        self._begins: list[int] = []  # addresses of mappings, sorted
        self._maps: dict[int, ref[mmap.mmap]] = {}  # address -> mapping
        self._gone: list[int] = []  # addresses of mappings that no tensor needs any more
        self._lock = threading.Lock()
        self._files: dict[Path, Opened] = {}
        self._filling: Filling | None = None

    def stored(self, place: Place, like: Tensor) -> Tensor:
        """Return a view of a file, of the dtype and shape of `like`. What is written to it does not reach the file."""
        if place.path not in self._files:
            file = open(place.path, "rb", buffering=0)  # noqa: SIM115 - closed with the mapping
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            finalize(mapped, file.close)
            self._files[place.path] = Opened(file, mapped, state_of(place.path))
            self._add(mapped)
        return view(self._files[place.path].mapped, place.offset, like)

    def temporary(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return tensors of the same dtypes and shapes in a new temporary file, without their values.

        The file has no name, and its space is free when no view of it is left, also after a kill. Raises `CannotWrite`
        if the disk lacks the space.
        """
        tensors = list(tensors)
        offsets, size = offsets_of(tensors)
        mapped, file = temporary_mapping(size)
        file.close()
        self._add(mapped)
        return [view(mapped, offset, tensor) for offset, tensor in zip(offsets, tensors, strict=True)]

    def packed(self, tensors: Sequence[Tensor], room: int, parts: Callable[[Tensor], Iterable[Tensor]]) -> list[Tensor]:
        """Return copies of tensors in a file as `temporary` makes it, of at least `room` bytes, which later calls go on
        to fill.

        Every open file takes a file descriptor, and a process may have 1024 of them, fewer than a model has layers.
        `parts(tensor)` yields the bytes of a tensor in their order, on the host, uint8 `[n]`. They are written to the
        file and not to its mapping, where the system would have to make every page first.
        """
        offsets, size = offsets_of(tensors)
        mapped = self._filling.with_room(size) if self._filling else None
        if mapped is None:
            mapped = self._fill_another(max(size, room))
        assert self._filling is not None
        begin = self._filling.taken(size)
        for offset, tensor in zip(offsets, tensors, strict=True):
            self._filling.write(begin + offset, parts(tensor))
        return [view(mapped, begin + offset, tensor) for offset, tensor in zip(offsets, tensors, strict=True)]

    def _fill_another(self, size: int) -> mmap.mmap:
        """Let `packed` fill a new file; return its mapping. The last file lives as long as a tensor in it."""
        if self._filling is not None:
            self._filling.file.close()
        mapped, file = temporary_mapping(size)
        self._filling = Filling(mapped, file)
        self._add(mapped)
        return mapped

    def _add(self, mapped: mmap.mmap) -> None:
        begin = torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()
        with self._lock:
            self._forget()
            self._maps[begin] = ref(mapped, lambda _: self._gone.append(begin))
            bisect.insort(self._begins, begin)

    def _forget(self) -> None:
        """Remove the mappings that are gone, whose addresses others may have."""
        while self._gone:
            begin = self._gone.pop()
            if begin in self._maps and self._maps[begin]() is None:
                del self._maps[begin], self._begins[bisect.bisect_left(self._begins, begin)]

    def _mapping(self, address: int) -> tuple[mmap.mmap | None, int]:
        """Return the mapping of an address, and the offset in it; None if there is none."""
        with self._lock:
            self._forget()
            index = bisect.bisect_right(self._begins, address) - 1
            begin = self._begins[index] if index >= 0 else address
            known = self._maps.get(begin)
        return known() if known else None, address - begin

    def read(self, tensor: Tensor, into: Tensor) -> None:
        """Copy a contiguous tensor into another; one that `stored` returned is read from its file.

        So pages of the mapping, which take longer to make than to read, are not needed.
        """
        mapped, offset = self._mapping(tensor.data_ptr())
        known = next(((path, it.file) for path, it in self._files.items() if it.mapped is mapped), None)
        if known is None or not into.is_contiguous():
            into.copy_(tensor)
            return
        (path, file), target = known, as_bytes(into).numpy().data
        file.seek(offset)
        while target and (count := file.readinto(target)):
            target = target[count:]
        if target:
            raise ModelChanged(f"the weight file {path} has become shorter while its weights were in use; restore it.")

    def release(self, tensor: Tensor) -> None:
        """Give back the memory that a view of a mapping takes; its values stay in the file. Leave other tensors alone.

        Pages that it shares with its neighbours are given back too; whoever reads them gets them again.
        """
        self._advise(tensor, "MADV_DONTNEED")

    def announce(self, tensor: Tensor) -> None:
        """Let the system read a view ahead."""
        self._advise(tensor, "MADV_WILLNEED")

    def _advise(self, tensor: Tensor, advice: str) -> None:
        mapped, offset = self._mapping(tensor.data_ptr())
        if mapped is None or not hasattr(mmap, advice):
            return
        first = offset // mmap.PAGESIZE * mmap.PAGESIZE
        if offset + tensor.nbytes <= len(mapped) and tensor.nbytes:
            mapped.madvise(getattr(mmap, advice), first, offset + tensor.nbytes - first)

    def check_unchanged(self) -> None:
        """Raise `ModelChanged` naming a file of dense weights that was written, replaced or removed since it was
        mapped.
        """
        for path, opened in self._files.items():
            if state_of(path) != opened.state:
                raise ModelChanged(
                    f"the weight file {path} has changed while its weights were in use; restore it, and give the same "
                    f"command again."
                )


def offsets_of(tensors: Iterable[Tensor]) -> tuple[list[int], int]:
    """Return where tensors begin in memory that holds one after the other, and the bytes of all, at least 1."""
    offsets, size = [], 0
    for tensor in tensors:
        offsets.append(size)
        size += -(-tensor.nbytes // ALIGNED) * ALIGNED
    return offsets, max(size, 1)


def state_of(path: Path) -> tuple[int, ...]:
    """Return what changes when a file is written or replaced; empty if it is not there."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def view(mapped: mmap.mmap, offset: int, like: Tensor) -> Tensor:
    """Return the tensor at `offset` of a mapping, of the dtype and shape of `like`, with a storage of its own."""
    if not like.numel():
        return torch.empty_like(like)
    return torch.frombuffer(mapped, dtype=like.dtype, count=like.numel(), offset=offset).view(like.shape)
