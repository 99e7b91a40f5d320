"""What is suspicious but legal about the inputs of a run, said beside its numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Doubt:
    """One reason to distrust a number: a sentence `text` about its `subject` (tokenizer, dense model, calibration)."""

    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.text}"
