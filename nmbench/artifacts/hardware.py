"""Hardware and engines that are known to run a pattern, and entries of a configuration on which loaders act."""

from __future__ import annotations

from pathlib import Path

from nmbench.artifacts.artifact import Unreadable
from nmbench.artifacts.folder import read_json
from nmbench.pattern import Pattern

SPARSITY = "sparsity_config"
HOLDERS = ("quantization_config", "compression_config")

TWO_FOUR = (
    "NVIDIA Ampere to Blackwell (sparse tensor cores; FP16, BF16, INT8, FP8)",
    "AMD CDNA3 and CDNA4 (hipSPARSELt)",
)
SLIDES = "NVIDIA sparse tensor cores through SlideSparse (INT8, FP8)"
SLIDING = tuple(Pattern(group - 2, group) for group in (4, 6, 8, 10))  # what SlideSparse runs as 2:4
PACKED = "nmbench's packed form (NVIDIA GPU, decoding; memory everywhere)"


def hardware_of(pattern: Pattern) -> list[str]:
    """Return the hardware and engines that are known to run a pattern.

    A pattern that keeps at most 2 of any 4 consecutive weights is run as 2:4.
    """
    two_of_four = (pattern.keep <= 2 and pattern.group % 4 == 0) or pattern == Pattern(1, 2)
    found = list(TWO_FOUR) if two_of_four else []
    if pattern in SLIDING:
        found.append(SLIDES)
    return [*found, PACKED]


def flags_of(config: Path | None) -> list[str]:
    """Return a sentence for every `sparsity_config` in a configuration: loaders act on it, and most refuse it."""
    try:
        content = read_json(config) if config else None
    except Unreadable:
        return []
    if not isinstance(content, dict):
        return []
    places = {SPARSITY: content, **{f"{holder}.{SPARSITY}": content.get(holder) for holder in HOLDERS}}
    return [
        f"config.json has {name}: vLLM 0.19 and newer refuse such a model, and no loader needs it for weights with "
        f"zeros in place; remove it, unless the folder is for vLLM 0.18 or older"
        for name, holder in places.items()
        if isinstance(holder, dict) and SPARSITY in holder
    ]
