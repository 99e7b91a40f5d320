"""The header of a safetensors file, with its metadata in order: equal contents are equal files, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

LENGTH_BYTES = 8  # of the number that a file begins with: the length of its header, little-endian


def sort_metadata(path: Path) -> None:
    """Sort the metadata in the header of a file in place; the library writes them in the order of a random hash."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        content = json.loads(file.read(length))
        content["__metadata__"] = dict(sorted(content.get("__metadata__", {}).items()))
        header = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
        if len(header) <= length:  # spaces fill the rest, as the library does itself
            file.seek(LENGTH_BYTES)
            file.write(header.ljust(length))
