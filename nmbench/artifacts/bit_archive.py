"""`.npz` archives of packed bits, as MaskLLM publishes its masks (NVlabs/MaskLLM, tool_compress_mask.py).

One uint8 vector `<name>.weight.mask` for every layer: `numpy.packbits` of the row-major mask, highest bit first. The
archive does not store shapes, so a mask is one flat row until a checkpoint supplies the shape of its layer.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from nmbench.artifacts.artifact import Artifact, Matrix, Rows, Unreadable, by_layer, layer_name, one_line
from nmbench.artifacts.bits import bool_rows

LARGE = 2**30  # bytes of one entry: a mask of 8.6 billion weights
HIGHEST_RATIO = 20  # masks hardly compress; a large entry beyond this ratio is taken for a bomb
BROKEN: tuple[type[Exception], ...] = (  # exceptions of a damaged archive, or of a damaged array header
    *(zipfile.BadZipFile, zlib.error, struct.error, ArithmeticError, EOFError, LookupError, MemoryError, OSError),
    *(RuntimeError, SyntaxError, ValueError),
)


def read_bit_archive(path: Path, large: int = LARGE) -> Artifact:
    """List the masks of an archive from the headers of its entries. Raises `Unreadable`.

    An entry that unpacks to more than `large` bytes, and to more than `HIGHEST_RATIO` times its compressed size, is
    refused.
    """
    found = {}
    with opened(path) as archive:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            check_size(path, entry, large)
            size = header_of(path, archive, entry)
            found[name] = Matrix(layer_name(name), (1, 8 * size), True, rows_of(path, entry), 1, flat=True)
    if not found:
        raise Unreadable(f"{path} is an archive without masks.")
    return Artifact(
        str(path),
        "archive of packed bits",
        masks=by_layer(str(path), found),
        tensors={name: (matrix.weights // 8,) for name, matrix in found.items()},
    )


def opened(path: Path) -> zipfile.ZipFile:
    """The archive at `path`. Raises `Unreadable` if the file is not a whole archive."""
    try:
        return zipfile.ZipFile(path)
    except BROKEN as error:
        raise Unreadable(f"{path} is not a whole .npz archive: {one_line(error)}.") from error


def check_size(path: Path, entry: zipfile.ZipInfo, large: int) -> None:
    """Raise `Unreadable` for an entry that is not an array as numpy stores it, or that unpacks to absurdly much."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or not entry.filename.endswith(".npy"):
        raise Unreadable(f"{path} is no archive of masks: {entry.filename!r} is not an array as numpy stores it.")
    if entry.file_size > large and entry.file_size > HIGHEST_RATIO * entry.compress_size:
        raise Unreadable(f"{entry.filename} in {path} unpacks to {entry.file_size} bytes; it was refused as a bomb.")


def header_of(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> int:
    """The number of bytes of a packed mask, from the header of its array. Raises `Unreadable` for any other array."""
    try:
        with archive.open(entry) as file:
            dtype, shape = array_header(file)
            left = entry.file_size - file.tell()
    except BROKEN as error:
        raise Unreadable(f"{entry.filename} in {path} is not a whole array: {one_line(error)}.") from error
    if dtype != np.uint8 or len(shape) != 1 or shape[0] != left or not left:
        raise Unreadable(
            f"{entry.filename} in {path} is not a packed mask: {dtype} {shape} in {left} bytes, expected uint8 bits in "
            f"one dimension."
        )
    return int(shape[0])


def array_header(file: Any) -> tuple[Any, tuple[int, ...]]:
    """Dtype and shape from the header of a `.npy` file; the header is parsed as a literal and never evaluated."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return dtype, shape


def rows_of(path: Path, entry: zipfile.ZipInfo) -> Any:
    """A function that opens one mask: it unpacks the archive's entry, one bit a weight, and verifies the checksum."""

    def open_rows() -> Rows:
        try:
            with opened(path) as archive, archive.open(entry) as file:
                array_header(file)
                packed = np.frombuffer(file.read(), np.uint8)
        except BROKEN as error:
            raise Unreadable(f"{entry.filename} in {path} is damaged: {one_line(error)}.") from error
        return bool_rows(packed, 1, "big")

    return open_rows
