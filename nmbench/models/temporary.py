"""Temporary files without a name, and their mappings: the space is free when nothing looks at it, also after a kill."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

from torch import Tensor

from nmbench.errors import CannotWrite

ALIGNED = 64  # bytes; tensors in one file or buffer begin at multiples
IN_MEMORY = ("tmpfs", "ramfs")  # file systems that are memory themselves


class Filling:
    """A temporary file that is filled bit by bit; it is closed when no view of its mapping is left."""

    def __init__(self, mapped: mmap.mmap, file: IO[bytes]) -> None:
        self.file = file
        self.size, self.filled = len(mapped), 0  # bytes
        self._mapped = weakref.ref(mapped)
        weakref.finalize(mapped, file.close)

    def with_room(self, size: int) -> mmap.mmap | None:
        """Return the mapping if `size` bytes are left."""
        return self._mapped() if self.filled + size <= self.size else None

    def taken(self, size: int) -> int:
        """Take `size` bytes; return where they begin."""
        begin, self.filled = self.filled, self.filled + -(-size // ALIGNED) * ALIGNED
        return begin

    def write(self, at: int, parts: Iterable[Tensor]) -> None:
        """Write bytes, uint8 `[n]` on the host, from `at` on. Raises `CannotWrite` if the disk does not take them."""
        try:
            self.file.seek(at)
            for part in parts:
                data = part.numpy().data
                while data:
                    data = data[self.file.write(data) :]
        except OSError as error:
            where = tempfile.gettempdir()
            raise CannotWrite(f"{where}: {error.strerror}; set TMPDIR to a folder on a disk.") from error


def temporary_mapping(size: int) -> tuple[mmap.mmap, IO[bytes]]:
    """Return a mapping of a new file without a name, of `size` bytes of zeros, in the folder of TMPDIR, and the file.

    The caller closes the file. Raises `CannotWrite` if there is not enough space, no folder can be written to, or the
    folder is memory.
    """
    try:
        folder = Path(tempfile.gettempdir())
    except OSError as error:
        raise CannotWrite(f"{error.strerror}; set TMPDIR to a folder on a disk that can be written to.") from error
    if (kind := file_system(folder)) in IN_MEMORY:
        raise CannotWrite(
            f"the folder for temporary files, {folder}, is memory itself ({kind}); set TMPDIR to a folder on a disk."
        )
    file: IO[bytes] | None = None
    try:
        file = tempfile.TemporaryFile(prefix="nmbench-", buffering=0)  # noqa: SIM115 - the caller closes it
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # else a full disk would end the process
        else:
            file.truncate(size)
        return mmap.mmap(file.fileno(), size), file
    except OSError as error:
        if file is not None:
            file.close()
        raise CannotWrite(
            f"{folder} has no room for {size / 2**30:.1f} GiB of weights ({error.strerror}); set TMPDIR to a folder "
            f"on a larger disk."
        ) from error


def file_system(folder: Path) -> str:
    """Return the type of the file system of a folder; empty where that is not known."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return ""
    kinds: Mapping[str, str] = {
        fields[1]: fields[2] for line in mounts.read_text().splitlines() if len(fields := line.split()) > 2
    }
    resolved = folder.resolve()
    return next((kinds[str(place)] for place in (resolved, *resolved.parents) if str(place) in kinds), "")
