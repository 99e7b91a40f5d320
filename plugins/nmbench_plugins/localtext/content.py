"""The bytes of local text files: decompressed, and decoded as UTF-8 or refused with the place of what is not."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path

import nmbench

PARQUET = b"PAR1"


def unzstd(content: bytes) -> bytes:
    """Undo Zstandard compression, by the library that Parquet tables are read with."""
    import pyarrow

    with pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd") as stream:
        return bytes(stream.read())


UNPACK: dict[bytes, tuple[str, Callable[[bytes], bytes]]] = {  # by the first bytes, whatever the name says
    b"\x1f\x8b": ("gzip", gzip.decompress),
    b"BZh91AY&SY": ("bzip2", bz2.decompress),
    b"\xfd7zXZ\x00": ("xz", lzma.decompress),
    b"\x28\xb5\x2f\xfd": ("Zstandard", unzstd),
}
MARKS = {  # byte order marks; the longer ones first
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def content_of(file: Path) -> bytes:
    """Return the content of a file, decompressed. Raises `NMBenchError` if it cannot be read."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise nmbench.NMBenchError(f"text file {file} cannot be read: {error.strerror}.") from None
    for mark, (name, unpack) in UNPACK.items():
        if content.startswith(mark):
            try:
                return unpack(content)
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
                raise nmbench.NMBenchError(
                    f"{file} is damaged {name} data ({error}); pack or fetch it again."
                ) from None
    return content


def decoded(content: bytes, file: Path) -> str:
    """Return the text of UTF-8 bytes with the line ends of Unix, without a byte order mark.

    Raises `NMBenchError` with the offset of the first byte that is not UTF-8, and for other encodings that the byte
    order mark names.
    """
    for mark, encoding in MARKS.items():
        if content.startswith(mark):
            raise nmbench.NMBenchError(
                f"{file} is not UTF-8 but {encoding}, by its byte order mark (BOM); convert it: iconv -f {encoding} -t "
                f"UTF-8."
            )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise nmbench.NMBenchError(
            f"{file} is not UTF-8: byte {error.start}, in line {line}, is 0x{content[error.start]:02x}; convert it "
            f"from its encoding: iconv -f ENCODING -t UTF-8."
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
