"""The model card of an export: the model, its metrics, the command that made it, and the checksums of its files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nmbench.artifacts.command_line import command_of
from nmbench.artifacts.rebuilding import Row
from nmbench.artifacts.validation import Validation
from nmbench.results.precision import printed
from nmbench.results.ranking import pattern_of
from nmbench.results.table import interval
from nmbench.spec import RunSpec


def model_card(row: Row, found: Validation, sums: Mapping[str, str], notes: Sequence[str] = (), use: str = "") -> str:
    """The card as Markdown, with the front matter that the hub reads.

    `notes` are sentences on weights that were changed when they were written, `use` says how to load the folder.
    """
    parts = [
        front_matter(row),
        heading(row, found),
        *notes,
        numbers(row),
        origin(row),
        f"## Use\n\n{use}",
        files(sums),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(row: Row) -> str:
    """Front matter with tags and, for a model from the hub, its base model."""
    scheme, _, name = row.spec.model.partition(":")
    base = [f"base_model: {name.partition('@')[0]}"] if scheme == "hf" else []
    return "\n".join(
        ["---", "library_name: transformers", *base, "tags:", "- pruning", "- semi-structured-sparsity", "---"]
    )


def heading(row: Row, found: Validation) -> str:
    record, proof = row.record, row.proof
    share = record["coverage"]["share_of_decoder"] if record["coverage"] else 0.0
    weights = (
        "The remaining weights were updated." if record["weights_changed"] else "The remaining weights are dense ones."
    )
    return (
        f"# {record['model']}, pruned to {pattern_of(record)} by {record['method']}\n\n"
        f"Strictly N:M, N of every M consecutive weights of a row kept: {proof['groups']} groups in {proof['layers']} "
        f"linear layers, {share:.1%} of the decoder's parameters. {weights} "
        f"{proof['zeros']} weights were dropped and are zero in place; {proof['extra_zeros']} kept ones happen to be "
        f"zero. Read back after writing: {len(found.layers)} layers strict."
    )


def numbers(row: Row) -> str:
    """Every metric beside the dense model's, the paired differences, and the cost of pruning."""
    lines = ["| | dense | pruned |", "|---|---|---|"]
    for name, value in row.record["metrics"].items():
        dense = row.dense["metrics"].get(name)
        lines.append(f"| {name} | {'-' if dense is None else printed(dense)} | {printed(value)} |")
    for name, difference in row.record["against_dense"].items():
        lines.append(f"| nats over dense, {name}, 95 % interval | 0 | {interval(difference)} |")
    cost = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in row.record["cost"].items())
    return "\n".join(["## Numbers", "", *lines, "", f"Cost of pruning: {cost}; {row.record['seconds']['prune']} s."])


def origin(row: Row) -> str:
    """The command, and all else that the metrics depend on: digests, seed, environment."""
    record, environment = row.record, row.record["environment"]
    facts = {
        "label": record["label"],
        "options": ", ".join(f"{name}={value}" for name, value in record["options"].items()) or "none",
        "seed": record["seed"],
        "calibration": f"{record['calibration']}, digest {record['calibration_digest']}",
        "dense model": f"{record['model']}, digest {row.manifest['model_digest'][:16]}",
        **{f"dense model's {name}": value for name, value in row.manifest["model_provenance"].items() if value},
        "masks": f"digest {row.proof['masks_digest']}",
        "protocol": f"digest {record['protocol_digest']}",
        "environment": ", ".join(f"{name} {value}" for name, value in environment.items()),
    }
    listed = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return f"## How it was made\n\n```sh\n{command_of(portable(row.spec))}\n```\n\n{listed}"


def portable(spec: RunSpec) -> RunSpec:
    """The specification without the device and the folders of plugin files, which belong to one machine."""
    return dataclasses.replace(spec, device="auto", plugins=tuple(Path(file).name for file in spec.plugins))


def files(sums: Mapping[str, Any]) -> str:
    return "\n".join(["## SHA-256", "", *listed(sums)])


def listed(sums: Mapping[str, Any]) -> Iterator[str]:
    for name, digest in sums.items():
        yield f"- `{name}` {digest}"
