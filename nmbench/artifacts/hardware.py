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
FOUR_PAIRS = "NVIDIA Blackwell FP4 (2 of 4 pairs; CUTLASS has an example for SM120; not run by us)"
SLIDING = tuple(Pattern(group - 2, group) for group in (4, 6, 8, 10))  # what SlideSparse runs as 2:4
PACKED = "nmbench's packed form (NVIDIA GPU, decoding; memory everywhere)"


def hardware_of(pattern: Pattern) -> list[str]:
    """Return the hardware and engines that are known to run a pattern.

    A pattern that keeps at most 2 of any 4 consecutive weights is run as 2:4, one that keeps weights in at most 2 of
    any 4 consecutive pairs as 2:4x2.
    """
    found = list(TWO_FOUR) if at_most_two(pattern.keep, pattern.group, 4) else []
    pairs = pattern.keep // 2 if pattern.unit % 2 == 0 else pattern.keep  # that hold the kept weights of a group
    if at_most_two(pairs, pattern.group, 8):
        found.append(FOUR_PAIRS)
    if pattern in SLIDING:
        found.append(SLIDES)
    return [*found, PACKED]


def at_most_two(count: int, group: int, window: int) -> bool:
    """Return whether `count` in every `group` weights are at most 2 in every `window` weights, from any group on."""
    if group % window == 0:
        return count <= 2
    return window % group == 0 and count * (window // group) <= 2


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
