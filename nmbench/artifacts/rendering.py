"""The output of `nmbench validate` and `nmbench diff`, as text and as JSON."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nmbench.artifacts.hardware import hardware_of
from nmbench.pattern import Pattern

if TYPE_CHECKING:
    from nmbench.artifacts.difference import Difference, Overlap
    from nmbench.artifacts.layer_report import LayerReport
    from nmbench.artifacts.validation import Validation


def validation_text(found: Validation) -> str:
    """The table of layers, the matrices that were not judged, the totals and the verdict."""
    lines = [
        ("layer", "shape", "pattern", "groups", "broken", "fewer", "extra zeros", "-0", "strict"),
        *(layer_line(layer) for layer in found.layers),
    ]
    parts = [f"{found.path}: {found.form}\n{found.basis}", table(lines)]
    parts += [skipped_text(found)] if found.skipped else []
    parts += [sums(found), *([service(found)] if found.strict else []), verdict(found)]
    return "\n\n".join(parts)


def layer_line(layer: LayerReport) -> tuple[str, ...]:
    shape = f"{layer.weights} in one row" if layer.flat else f"{layer.shape[0]} x {layer.shape[1]}"
    counts = (layer.groups, layer.broken, layer.fewer, layer.extra_zeros, layer.negative_zeros)
    return (layer.name, shape, layer.pattern or "-", *map(str, counts), "yes" if layer.strict else "NO")


def table(lines: Sequence[Sequence[str]]) -> str:
    """Lines of aligned columns: the first column aligned left, the others right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def skipped_text(found: Validation) -> str:
    reasons = Counter(found.skipped.values())
    first = {reason: name for name, reason in reversed(list(found.skipped.items()))}
    listed = "; ".join(f"{first[why]}{f' and {n - 1} more' if n > 1 else ''}: {why}" for why, n in reasons.items())
    return f"Not judged: {listed}."


def sums(found: Validation) -> str:
    """Totals over all layers, the coverage and the speed."""
    total = {name: sum(getattr(layer, name) for layer in found.layers) for name in ("groups", "fewer", "extra_zeros")}
    negative = sum(layer.negative_zeros for layer in found.layers)
    lines = [
        f"{total['groups']} groups in {len(found.layers)} layers; {total['fewer']} groups have fewer non-zeros than N, "
        f"{total['extra_zeros']} extra zeros, {negative} negative zeros"
        + (" (some 2:4 kernels compute garbage from those)" if negative else ""),
        "coverage unknown: masks alone do not say how large the decoder is"
        if found.coverage is None
        else f"coverage {found.coverage:.1%} of the decoder's parameters lie in strict layers",
        f"{found.bytes / 1e9:.3f} GB in {found.seconds:.2f} s, {speed(found):.2f} GB/s",
    ]
    if any(layer.flat for layer in found.layers):
        lines.append("the file does not store the shapes of its masks; give --like MODEL_FOLDER to have rows named")
    return "\n".join(lines)


def service(found: Validation) -> str:
    """Whether groups have exactly N non-zeros, which hardware runs the patterns, and flags of the configuration."""
    lines = [fullness(found)]
    lines += [f"{pattern} runs on: {'; '.join(names)}" for pattern, names in hardware(found).items()]
    return "\n".join([*lines, *(f"WARNING {flag}" for flag in found.flags)])


def fullness(found: Validation) -> str:
    """Whether every group has exactly N non-zeros, or at most N, with the number of groups that have fewer."""
    if not found.weights_seen:
        return "exactly N kept in every group; masks alone do not show how many of those weights are zero"
    if not found.fewer:
        return "exactly N non-zeros in every group"
    return (
        f"at most N non-zeros: {found.fewer} groups have fewer than N, in which some kernels of AMD RDNA4 invent "
        f"values; nmbench export --exact fills such groups"
    )


def hardware(found: Validation) -> dict[str, list[str]]:
    """The hardware that is known to run each pattern."""
    patterns = dict.fromkeys(layer.pattern for layer in found.layers if layer.pattern)
    return {pattern: hardware_of(Pattern.parse(pattern)) for pattern in patterns}


def speed(found: Validation) -> float:
    """Speed of reading in GB/s, by the bytes of the matrices before compression."""
    return found.bytes / 1e9 / found.seconds if found.seconds else 0.0


def verdict(found: Validation) -> str:
    """One line: STRICT with the patterns, or NOT STRICT with the first problem."""
    if found.strict:
        patterns = Counter(layer.pattern for layer in found.layers)
        return "STRICT " + ", ".join(f"{pattern} ({count} layers)" for pattern, count in patterns.items())
    bad = [layer for layer in found.layers if not layer.strict]
    return f"NOT STRICT: {len(bad)} of {len(found.layers)} layers; {bad[0].name}: {bad[0].problem}."


def validation_json(found: Validation) -> dict[str, Any]:
    """The validation as plain data."""
    content = dataclasses.asdict(found)
    layers = [{**dataclasses.asdict(layer), "strict": layer.strict} for layer in found.layers]
    first = found.first_problem
    problem = {"layer": first.name, "problem": first.problem, "first": first.first} if first else None
    return {
        **content,
        "layers": layers,
        "strict": found.strict,
        "first_problem": problem,
        "exactly": found.weights_seen and not found.fewer,
        "groups_with_fewer": found.fewer,
        "hardware": hardware(found),
        "gb_per_second": speed(found),
    }


def difference_text(found: Difference) -> str:
    """The table of overlaps, with all layers together in the last line."""
    lines = [("layer", "pattern", "equal bits", "equal groups", "Jaccard")]
    lines += [overlap_line(layer) for layer in (*found.layers, found.total)]
    parts = [f"{found.first} against {found.second}", table(lines)]
    for path, names in ((found.first, found.only_first), (found.second, found.only_second)):
        if names:
            parts.append(f"{len(names)} layers are in {path} alone; first: {names[0]}")
    return "\n\n".join([*parts, *found.notes])


def overlap_line(layer: Overlap) -> tuple[str, str, str, str, str]:
    shares = layer.shares
    groups = shares["groups"]
    shown = "-" if groups is None else f"{groups:.2%}"
    return layer.name, layer.pattern or "-", f"{shares['bits']:.2%}", shown, f"{shares['jaccard']:.4f}"


def difference_json(found: Difference) -> dict[str, Any]:
    """The comparison as plain data, with the shares."""
    layers = [{**dataclasses.asdict(layer), "shares": layer.shares} for layer in found.layers]
    return {
        **dataclasses.asdict(found),
        "layers": layers,
        "total": {**dataclasses.asdict(found.total), "shares": found.total.shares},
    }
