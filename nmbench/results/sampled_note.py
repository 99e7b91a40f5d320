"""Calibration text that was sampled from the dense model, in words: its protocol, and the cost that all rows share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nmbench.results.format import Record, SampledText


def sampled_notes(records: Sequence[Record]) -> str:
    """Return one line on the samples of every seed and run directory; nothing if the calibration text is real."""
    several = len({record.get("directory") for record in records}) > 1
    found: dict[tuple[str | None, int | None], SampledText] = {}
    for record in records:
        if about := record.get("sampled"):
            found.setdefault((record.get("directory"), record["seed"]), about)
    return "\n".join(
        f"NOTE {f'{directory}: ' if several else ''}{composed(about)}, seed {seed}: {cost(about)}{left_out(about)}."
        for (directory, seed), about in found.items()
    )


def sampled_protocol(records: Sequence[Record]) -> Iterator[str]:
    """Yield how the calibration text of one run was sampled, once for all seeds."""
    about = next((about for record in records if (about := record.get("sampled"))), None)
    if about:
        top_p = "none" if about["top_p"] is None else about["top_p"]
        drawn = f"temperature {about['temperature']}, top_p {top_p}, {about['batch']} windows at once"
        yield f"{composed(about)} ({drawn}); {cost(about)}"


def composed(about: SampledText) -> str:
    """Return the windows by origin."""
    real = f" and {about['real_windows']} windows of real text" if about["real_windows"] else ""
    prompts = f"prompts of {about['prompt']} tokens from {about['source']}"
    return f"calibration text: {about['windows']} windows sampled from the dense model, {prompts}{real}"


def cost(about: SampledText) -> str:
    """Return the cost of the samples, which no row counts."""
    return (
        f"sampling read {about['forward_tokens']:,} tokens in {about['seconds']:.1f} s, shared by all rows and counted "
        f"in none"
    )


def left_out(about: SampledText) -> str:
    """Return the clause on samples that were left out; nothing if all were kept."""
    listed = ", ".join(f"{count} that repeat {name}" for name, count in about["left_out"].items())
    return f"; left out: {listed}" if listed else ""
