"""The gain and the cost of mask learners and repairs over their starts: a table and a plot of finished runs.

    nmbench run --method swaps-judged --method maskpro --method soft --out RUN
    python learners.py RUN --json results/learners.json --plot results/learners.png

Every learner is compared with the row of its initial mask in the same run: nats gained on the test text, forward and
backward tokens, seconds, peak device memory. In the plot a line leads from the initial mask, at its forward tokens, to
the learnt mask, at the forward tokens of both. Rows of several runs, say one for each seed, are joined if their
protocols are equal. `--against LABEL` divides the gain of every learner by that of another one on the same start, at
the same pattern and seed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nmbench.results.records import newest, read_records

DEVICE = ("device_name", "torch", "transformers", "dtype", "eval_dtype", "nmbench")

FIGURES = (
    "label",
    "pattern",
    "seed",
    "started_from",
    "options",
    "metrics",
    "against_dense",
    "cost",
    "seconds",
    "peak_bytes",
    "notes",
)

Rows = Mapping[tuple[str, str, int], dict[str, Any]]


class Gain(NamedTuple):
    """A learner's row beside that of its initial mask; nats on the test text, over the dense model."""

    label: str
    init: str
    pattern: str
    seed: int
    perplexity_init: float
    perplexity: float
    nats_init: float
    nats: float
    nats_gained: float
    forward_tokens_init: int
    forward_tokens: int
    backward_tokens: int
    seconds: float
    device_gib: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="run directories, or their records.jsonl")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--against", metavar="LABEL", help="say how many times the gain of this learner others gain")
    args = parser.parse_args()
    runs = [read(path) for path in args.runs]
    records = [record for run in runs for record in run]
    if len({record["protocol_digest"] for record in records}) != 1:
        raise SystemExit("Error: the runs follow different protocols; compare those of each protocol by themselves.")
    gains = [gain for run in runs for gain in found(run)]
    print(table(gains))
    times = ratios(gains, args.against) if args.against else []
    for line in listed(times, args.against):
        print(f"\n{line}")
    if args.json:
        whole = {**summary(records, gains), **({"against": times} if args.against else {})}
        args.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        plot(gains, args.plot)


def read(path: Path) -> list[dict[str, Any]]:
    return list(newest(read_records(path / "records.jsonl" if path.is_dir() else path)))


def found(records: Sequence[dict[str, Any]]) -> list[Gain]:
    """The gains of all finished learners of one run."""
    done = [record for record in records if record["status"] == "ok"]
    dense = math.log(value(next(record for record in done if record["label"] == "dense")))
    rows = {key(record): record for record in done}
    gains = []
    for row in done:
        init = start_of(row, rows)
        if init is None:
            continue
        nats_init, nats = (math.log(value(record)) - dense for record in (init, row))
        peak = row["peak_bytes"]["device"]
        gains.append(
            Gain(
                row["label"],
                row["options"]["init"],
                row["pattern"],
                row["seed"],
                round(value(init), 4),
                round(value(row), 4),
                round(nats_init, 4),
                round(nats, 4),
                round(nats_init - nats, 4),
                init["cost"]["forward_tokens"],
                own(row, init, "cost", "forward_tokens"),
                own(row, init, "cost", "backward_tokens"),
                round(own(row, init, "seconds", "prune"), 3),
                peak and round(peak / 2**30, 2),
            )
        )
    return gains


def start_of(row: dict[str, Any], rows: Rows) -> dict[str, Any] | None:
    return rows.get((row["started_from"], *key(row)[1:]))


def own(row: dict[str, Any], init: dict[str, Any] | None, part: str, name: str) -> Any:
    """A figure of a row less that of its start, which it includes."""
    return row[part][name] - (init[part][name] if init else 0)


def key(record: dict[str, Any]) -> tuple[str, str, int]:
    return record["label"], record["pattern"], record["seed"]


def value(record: dict[str, Any]) -> float:
    """The value of the first metric, a perplexity."""
    return float(next(iter(record["metrics"].values()))["value"])


def table(gains: Sequence[Gain]) -> str:
    """The gains as a Markdown table."""
    lines = ["| learner | from | pattern | seed | perplexity | nats gained | forward tokens | backward | seconds |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for gain in gains:
        cells = (
            f"{gain.label} | {gain.init} | {gain.pattern} | {gain.seed}",
            f"{gain.perplexity_init:.1f} → {gain.perplexity:.1f} | {gain.nats_gained:.3f}",
            f"{gain.forward_tokens / 1e6:.1f} M | {gain.backward_tokens / 1e6:.1f} M | {gain.seconds:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ratios(gains: Sequence[Gain], label: str) -> list[dict[str, Any]]:
    """The gain of every learner over that of `label`, where both have the same start, pattern and seed."""
    known = {(gain.init, gain.pattern, gain.seed): gain for gain in gains if gain.label == label}
    pairs = [(gain, known.get((gain.init, gain.pattern, gain.seed))) for gain in gains if gain.label != label]
    return [
        {
            **{"label": gain.label, "against": label, "pattern": gain.pattern, "seed": gain.seed},
            **{"forward_tokens": [gain.forward_tokens, other.forward_tokens]},
            "times": round(gain.nats_gained / other.nats_gained, 3) if other.nats_gained else None,
        }
        for gain, other in pairs
        if other is not None
    ]


def listed(times: Sequence[Mapping[str, Any]], label: str) -> list[str]:
    """One line for every learner and pattern, with the ratios of all seeds."""
    rows: dict[tuple[str, str], list[str]] = {}
    for one in times:
        times_text = "-" if one["times"] is None else f"{one['times']:.2f}"
        rows.setdefault((one["label"], one["pattern"]), []).append(times_text)
    return [
        f"{name} gains {' and '.join(found)} times what {label} gains, at {pattern}"
        for (name, pattern), found in rows.items()
    ]


def summary(records: Sequence[dict[str, Any]], gains: Sequence[Gain]) -> dict[str, Any]:
    """The gains with all options and learning curves, and the environment they depend on."""
    about = [record["environment"] for record in records]
    rows = [{name: record.get(name) for name in FIGURES} for record in records]
    return {
        "environment": {name: sorted({str(one[name]) for one in about if name in one}) for name in DEVICE},
        "protocol_digest": records[0]["protocol_digest"],
        "gains": [gain._asdict() for gain in gains],
        "rows": rows,
    }


def plot(gains: Sequence[Gain], path: Path) -> None:
    """One panel for each pattern: nats over the dense model against forward tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = plt.colormaps["tab20"]
    patterns, labels = sorted({g.pattern for g in gains}), sorted({(g.label, g.init) for g in gains})
    figure, axes = plt.subplots(
        1, len(patterns), figsize=(5.5 * len(patterns) + 4.5, 4.2), squeeze=False, layout="constrained"
    )
    for axis, pattern in zip(axes[0], patterns, strict=True):
        for number, (label, init) in enumerate(labels):
            shown = f"{label} from {init}"
            for gain in gains:
                if (gain.label, gain.init, gain.pattern) == (label, init, pattern):
                    tokens = gain.forward_tokens_init, gain.forward_tokens_init + gain.forward_tokens
                    nats = gain.nats_init, gain.nats
                    axis.plot(tokens, nats, "o-", color=colours(number % 20), label=shown, markersize=4)
                    shown = "_" + shown  # one entry in the legend for all seeds
        axis.set_xscale("log")
        axis.set_xlabel("forward tokens, those of the initial mask included")
        axis.set_ylabel("test loss over the dense model (nats per token)")
        axis.set_title(pattern)
        axis.grid(alpha=0.3)
    handles = {h.get_label(): h for axis in axes[0] for h in axis.lines if not h.get_label().startswith("_")}
    figure.legend(handles=list(handles.values()), loc="outside right upper")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
