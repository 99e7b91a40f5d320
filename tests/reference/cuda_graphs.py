"""What a model does that a CUDA graph cannot hold."""

from __future__ import annotations

from typing import Any

NOTES = {"cuda graph": "none: operation not permitted when stream is capturing"}  # of the record


def refuse(work: Any) -> Any:
    """Stands in for `graph_of`."""
    raise RuntimeError("operation not permitted when stream is capturing\nmore")
