"""Data sets from local files: plain text, JSON lines with a "text" field, Parquet tables with a "text" column.

A folder stands for its files, in the order of their names; gzip, bzip2, xz and Zstandard are undone. What is no text is
refused with the file and the line, never guessed at.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import nmbench
from nmbench_plugins.localtext.content import PARQUET, content_of, decoded

PACKED = ("", ".gz", ".bz2", ".xz", ".zst")
SHOWN = 40  # characters of a value that a message shows
KINDS = {bool: "a truth value", int: "a number", float: "a number", str: "a string"}


@dataclass(frozen=True)
class LocalText(nmbench.Dataset):
    """Local files as one pool of text; calibration and test need different files (overlap is refused).

    Raises `NMBenchError` if there is no such file, or no such file in a folder.
    """

    kinds: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        if not self.argument:
            raise nmbench.NMBenchError("this data set needs a file after the colon, for example text:novel.txt.")
        self.files()

    @property
    def path(self) -> Path:
        """The file or folder; `~` is the home of the user."""
        return Path(self.argument).expanduser()

    def files(self) -> list[Path]:
        """Return the file, or the text files of the folder and of folders in it, in the order of their names."""
        try:
            path = self.path
            if path.is_file():
                return [path]
            found = sorted(file for file in files_below(path) if self.is_text(file)) if path.is_dir() else []
            there = path.exists()
        except (OSError, RuntimeError, ValueError) as error:
            raise nmbench.NMBenchError(f"text file {self.argument} cannot be read: {first_line(error)}.") from None
        if odd := [file for file in found if not file.is_file()]:
            raise nmbench.NMBenchError(
                f"{odd[0]} is no file that can be read (a link to nothing, or a pipe); take it out of the folder."
            )
        if found:
            return found
        if not there:
            raise nmbench.NMBenchError(f"text file {self.argument} does not exist.")
        if not path.is_dir():
            raise nmbench.NMBenchError(f"{self.argument} is neither a file nor a folder; write its text to a file.")
        kinds = " or ".join((*self.kinds, ".parquet"))
        raise nmbench.NMBenchError(f"folder {self.argument} holds no file whose name ends in {kinds}; name a file.")

    def is_text(self, file: Path) -> bool:
        """Return True for a file of a folder that is to be read, by its name; what is hidden is not."""
        endings = (*(f"{kind}{packed}" for kind in self.kinds for packed in PACKED), ".parquet")
        hidden = any(part.startswith(".") for part in file.relative_to(self.path).parts)
        return not hidden and file.name.lower().endswith(endings)

    def texts(self, split: str) -> Iterable[str]:
        return [] if split == "selection" else self.documents()

    def documents(self) -> Iterator[str]:
        """Yield the texts of all files. Raises `NMBenchError` with file and place for what is no text."""
        empty = True
        for file in self.files():
            content = content_of(file)
            for text in rows_of(content, file) if content.startswith(PARQUET) else self.documents_of(content, file):
                empty = empty and not text.strip()
                yield text
        if empty:
            raise nmbench.NMBenchError(f"{self.argument} holds no text; name another file.")

    def documents_of(self, content: bytes, file: Path) -> Iterator[str]:
        """Yield the texts in the bytes of one file."""
        raise NotImplementedError

    def provenance(self) -> Mapping[str, Any]:
        digests = {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in self.files()}
        if self.path.is_file():
            return {"sha256": digests[str(self.path)]}
        return {"sha256": {str(Path(file).relative_to(self.path)): digest for file, digest in digests.items()}}


def files_below(folder: Path) -> Iterator[Path]:
    """Yield what is in a folder and in the folders in it, linked ones too, each folder once, but for folders.

    Raises `OSError` for a folder that cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(place, name) for name in names)


@dataclass(frozen=True)
class TextFiles(LocalText):
    """Plain UTF-8 text: every file is one document."""

    kinds: ClassVar[tuple[str, ...]] = (".txt",)

    def documents_of(self, content: bytes, file: Path) -> Iterator[str]:
        text = decoded(content, file)
        if (at := text.find("\0")) >= 0:
            raise nmbench.NMBenchError(
                f"{file} line {line_of(text, at)} holds a NUL character: it is no text, or UTF-16 text; convert it to "
                f"UTF-8."
            )
        yield text


@dataclass(frozen=True)
class JsonLines(LocalText):
    """One JSON object a line; the "text" of every object is a document."""

    kinds: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson", ".json")

    def documents_of(self, content: bytes, file: Path) -> Iterator[str]:
        for number, line in enumerate(decoded(content, file).split("\n"), start=1):
            if line.strip().strip("\ufeff"):
                yield text_in(line.strip().strip("\ufeff"), f"{file} line {number}")


def text_in(line: str, where: str) -> str:
    """Return the "text" of one line of JSON. Raises `NMBenchError` that says `where` and what there is instead."""
    try:
        item = json.loads(line)
    except RecursionError:
        raise nmbench.NMBenchError(f"{where} is nested too deeply to be read; keep its text alone.") from None
    except ValueError as error:
        raise nmbench.NMBenchError(f'{where} is not a JSON object with a "text" field: {error}.') from None
    if not isinstance(item, dict):
        hint = "; a JSON array becomes lines by `jq -c '.[]'`" if isinstance(item, list) else ""
        raise nmbench.NMBenchError(f'{where} is not a JSON object with a "text" field but {named(item)}{hint}.')
    if "text" not in item:
        fields = ", ".join(repr(name) for name in list(item)[:8]) or "none"
        raise nmbench.NMBenchError(f'{where} is not a JSON object with a "text" field; its fields: {fields:.200}.')
    return checked(item["text"], f'the "text" of {where}')


def rows_of(content: bytes, file: Path) -> Iterator[str]:
    """Yield the "text" column of a Parquet table, row by row. Raises `NMBenchError` with file and row."""
    import io

    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(content))
        names = table.schema_arrow.names
    except (OSError, ValueError) as error:
        raise nmbench.NMBenchError(
            f"{file} is a damaged Parquet table ({first_line(error)}); fetch it again."
        ) from None
    if "text" not in names:
        raise nmbench.NMBenchError(f'{file} has no column "text"; its columns: {", ".join(names):.200}.')
    number = 0
    try:
        for batch in table.iter_batches(columns=["text"]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield checked(value, f'the "text" of {file} row {number}')
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise nmbench.NMBenchError(f"{file} cannot be read after row {number} ({first_line(error)}).") from None


def checked(value: Any, where: str) -> str:
    """Return a value that is text. Raises `NMBenchError` for another type, and for half a character."""
    if not isinstance(value, str):
        raise nmbench.NMBenchError(f"{where} is {named(value)}, not a string; take the entry out, or make it text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise nmbench.NMBenchError(
            f"{where} holds a lone surrogate, U+{ord(value[error.start]):04X} at character {error.start}: half of a "
            f"character that was cut; take the entry out, or mend it."
        ) from None
    return value


def named(value: Any) -> str:
    """Name a JSON value by its kind, as people know it, and show the beginning of a short one."""
    if value is None:
        return "null"
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    kind = KINDS.get(type(value), type(value).__name__)
    return f"{kind} ({value!r:.{SHOWN}})"


def line_of(text: str, at: int) -> int:
    """Return the number of the line of a character, from 1."""
    return text.count("\n", 0, at) + 1


def first_line(error: Exception) -> str:
    """Return the first line of the text of an exception."""
    return (str(error).splitlines() or [""])[0]


@nmbench.hookimpl
def nmbench_register_datasets(register: nmbench.Register) -> None:
    register("text", TextFiles)
    register("jsonl", JsonLines)
