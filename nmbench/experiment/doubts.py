"""Doubts about the inputs of a run: suspicious but legal, and printed and recorded beside the numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Doubt:
    """A reason to distrust a number: its `subject` (tokenizer, dense model ...) and one sentence, `text`."""

    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.text}"
