"""Data sets from local files: a plain text file, or a file of JSON lines with a "text" field."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nmbench


@dataclass(frozen=True)
class LocalFile(nmbench.Dataset):
    """A local file as one pool of text; calibration and test need different files (overlap is refused)."""

    def __post_init__(self) -> None:
        if not self.argument:
            raise nmbench.NMBenchError("this data set needs a file after the colon, for example text:novel.txt.")
        if not Path(self.argument).is_file():
            raise nmbench.NMBenchError(f"text file {self.argument} does not exist.")

    def texts(self, split: str) -> Iterable[str]:
        return [] if split == "selection" else self.documents()

    def documents(self) -> Iterable[str]:
        """Return the texts in the file."""
        raise NotImplementedError

    def content(self) -> str:
        """Return the text of the file. Raises `NMBenchError` if the file is not UTF-8."""
        try:
            return Path(self.argument).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise nmbench.NMBenchError(f"text file {self.argument} is not UTF-8: byte {error.start}.") from None

    def provenance(self) -> Mapping[str, Any]:
        return {"sha256": hashlib.sha256(Path(self.argument).read_bytes()).hexdigest()}


@dataclass(frozen=True)
class TextFile(LocalFile):
    """A plain UTF-8 text file, taken as one document."""

    def documents(self) -> Iterable[str]:
        return [self.content()]


@dataclass(frozen=True)
class JsonLines(LocalFile):
    """A file with one JSON object a line; each object's "text" is a document."""

    def documents(self) -> Iterator[str]:
        for number, line in enumerate(self.content().split("\n"), start=1):
            if line.strip():
                yield self.text_of(line, number)

    def text_of(self, line: str, number: int) -> str:
        """Return the "text" of one line. Raises `NMBenchError` with the line's number if there is none."""
        try:
            return str(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError):
            raise nmbench.NMBenchError(
                f'{self.argument} line {number} is not a JSON object with a "text" field.'
            ) from None


@nmbench.hookimpl
def nmbench_register_datasets(register: nmbench.Register) -> None:
    register("text", TextFile)
    register("jsonl", JsonLines)
