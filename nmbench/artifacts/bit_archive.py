"""`.npz` archives of packed bits, as masks are published: `numpy.packbits` of the row-major mask, highest bit first.

Two forms are known. MaskLLM (NVlabs/MaskLLM, tool_compress_mask.py) stores one uint8 vector `<name>.weight.mask` for
every layer and no shapes: a mask is one flat row until a checkpoint supplies the shape of its layer. PATCH
(Paramathic/patch, scripts/release), which publishes masks of MaskLLM as well, stores the vector as `<name>.weight`,
its shape as `<name>.weight.__shape__`, and a JSON text `__meta__`. Its masks are the non-zeros of a
checkpoint: a kept weight that is zero counts as dropped.
"""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nmbench.artifacts.artifact import Artifact, Matrix, Rows, Unreadable, by_layer, layer_name, one_line
from nmbench.artifacts.bits import bool_rows
from nmbench.errors import NMBenchError
from nmbench.pattern import Pattern

SHAPE, META = ".__shape__", "__meta__"
LARGEST_META = 2**20  # bytes of the JSON text, four for every character
LARGE = 2**30  # bytes of one entry: a mask of 8.6 billion weights
HIGHEST_RATIO = 20  # masks hardly compress; a large entry beyond this ratio is taken for a bomb
BROKEN: tuple[type[Exception], ...] = (  # exceptions of a damaged archive, or of a damaged array header
    *(zipfile.BadZipFile, zlib.error, struct.error, ArithmeticError, EOFError, LookupError, MemoryError, OSError),
    *(RuntimeError, SyntaxError, TypeError, ValueError),
)


def read_bit_archive(path: Path, large: int = LARGE) -> Artifact:
    """List the masks of an archive from the headers of its entries. Raises `Unreadable`.

    An entry that unpacks to more than `large` bytes, and to more than `HIGHEST_RATIO` times its compressed size, is
    refused. Of the entries only shapes and metadata are read.
    """
    found: dict[str, Matrix] = {}
    shapes: dict[str, tuple[int, int]] = {}
    about: Mapping[str, Any] = {}
    with opened(path) as archive:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            check_size(path, entry, large)
            if name == META:
                about = metadata_of(path, archive, entry)
            elif name.endswith(SHAPE):
                shapes[name.removesuffix(SHAPE)] = shape_of(path, archive, entry)
            else:
                size = packed_size(path, archive, entry)
                found[name] = Matrix(layer_name(name), (1, 8 * size), True, rows_of(path, entry), 1, flat=True)
    if not found:
        raise Unreadable(f"{path} is an archive without masks.")
    tensors = {name: (matrix.weights // 8,) for name, matrix in found.items()}
    found.update(with_shapes(path, found, shapes))
    return Artifact(
        str(path),
        "archive of packed bits" + (" and shapes" if shapes else ""),
        masks=by_layer(str(path), found),
        tensors=tensors,
        patterns=claims(found, about),
        about=about,
        at_most=bool(shapes),
    )


def with_shapes(path: Path, found: Mapping[str, Matrix], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Matrix]:
    """The masks that have a shape in the archive, in that shape.

    Raises `Unreadable` for a shape without a mask, and for a mask with more or fewer bytes than its shape takes.
    """
    result = {}
    for name, shape in shapes.items():
        if name not in found:
            raise Unreadable(f"{path} has a shape for {name}, but no mask.")
        if not 0 <= found[name].weights - shape[0] * shape[1] < 8:  # packed bits fill whole bytes
            raise Unreadable(f"{path} has {found[name].weights} bits for {name}, not those of its shape {shape}.")
        result[name] = found[name].shaped(shape)
    return result


def claims(found: Mapping[str, Matrix], about: Mapping[str, Any]) -> dict[str, Pattern]:
    """The pattern of the metadata for every layer, if half of a group is kept.

    Elsewhere the text does not decide: some tools count the pruned weights as N. Such masks have no claim.
    """
    try:
        pattern = Pattern.parse(str(about.get("pattern", "")))
    except NMBenchError:
        return {}
    return {matrix.name: pattern for matrix in found.values()} if 2 * pattern.keep == pattern.group else {}


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


def packed_size(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> int:
    """The number of bytes of a packed mask, from the header of its array. Raises `Unreadable` for any other array."""
    dtype, shape, left = header_of(path, archive, entry)
    if dtype != np.uint8 or len(shape) != 1 or shape[0] != left or not left:
        raise Unreadable(
            f"{entry.filename} in {path} is not a packed mask: {dtype} {shape} in {left} bytes, expected uint8 bits in "
            f"one dimension."
        )
    return int(shape[0])


def shape_of(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """The shape that an entry holds. Raises `Unreadable` for anything but two positive integers."""
    dtype, shape, left = header_of(path, archive, entry)
    if dtype.kind not in "iu" or shape != (2,) or left != 2 * dtype.itemsize:
        raise Unreadable(
            f"{entry.filename} in {path} is not the shape of a matrix: {dtype} {shape} in {left} bytes, expected two "
            f"integers."
        )
    rows, columns = map(int, np.frombuffer(content_of(path, archive, entry), dtype))
    if rows < 1 or columns < 1:
        raise Unreadable(f"{entry.filename} in {path} is not the shape of a matrix: {(rows, columns)}.")
    return rows, columns


def metadata_of(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> dict[str, Any]:
    """The metadata that an entry holds as one JSON text. Raises `Unreadable` for anything but a JSON object."""
    if entry.file_size > LARGEST_META:
        raise Unreadable(f"{entry.filename} in {path} has {entry.file_size} bytes; metadata have a few hundred.")
    dtype, shape, left = header_of(path, archive, entry)
    if dtype.kind != "U" or shape != () or left != dtype.itemsize:
        raise Unreadable(
            f"{entry.filename} in {path} is not metadata: {dtype} {shape} in {left} bytes, expected one text."
        )
    try:
        about = json.loads(str(np.frombuffer(content_of(path, archive, entry), dtype)[0]))
    except BROKEN as error:
        raise Unreadable(f"{entry.filename} in {path} is not JSON: {one_line(error)}.") from error
    if not isinstance(about, dict):
        raise Unreadable(f"{entry.filename} in {path} is not a JSON object.")
    return about


def header_of(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> tuple[Any, tuple[int, ...], int]:
    """Dtype, shape and bytes after the header of an array. Raises `Unreadable` for what is no array."""
    try:
        with archive.open(entry) as file:
            dtype, shape = array_header(file)
            return dtype, shape, entry.file_size - file.tell()
    except BROKEN as error:
        raise Unreadable(f"{entry.filename} in {path} is not a whole array: {one_line(error)}.") from error


def content_of(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """The bytes of an array behind its header, their checksum verified. Raises `Unreadable`."""
    try:
        with archive.open(entry) as file:
            array_header(file)
            return file.read()
    except BROKEN as error:
        raise Unreadable(f"{entry.filename} in {path} is damaged: {one_line(error)}.") from error


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
        with opened(path) as archive:
            packed = np.frombuffer(content_of(path, archive, entry), np.uint8)
        return bool_rows(packed, 1, "big")

    return open_rows
