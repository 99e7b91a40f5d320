"""The quality of the built-in methods on the embedded demo: two patterns, three seeds.

    python demo_quality.py --out RUN_DIRECTORY --json results/demo_quality.json
    python demo_quality.py --out RUN_DIRECTORY --json results/demo_repairs.json --only wanda --only reconstruct
    python demo_quality.py --out RUN_DIRECTORY --json results/demo_repairs_1_4.json --pattern 1:4 --only alps

Takes an hour on two CPU cores with all methods; the same command resumes a killed run. Prints the table, the rankings
with paired intervals, and writes the figures with device and versions to the JSON file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nmbench import MethodSpec, Pattern, Results, RunSpec, load_plugins, render
from nmbench.experiment.progress import ProgressPrinter
from nmbench.run import run

METHODS = (
    *(MethodSpec(name, name) for name in ("magnitude", "wanda", "ria", "sparsegpt", "alps", "maskpro")),
    MethodSpec("alps-half-way", "alps", {"preset": "half-way"}),
    MethodSpec("least-squares", "least-squares", {"dense_weight": 0.6, "residual_weight": 0.6}),
    MethodSpec("reconstruct", "reconstruct"),
)
PATTERNS = (Pattern(2, 4), Pattern(4, 8))
FIGURES = ("label", "pattern", "seed", "options", "metrics", "against_dense", "seconds", "peak_bytes", "cost", "notes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--pattern", type=Pattern.parse, action="append", help="[2:4 and 4:8]")
    parser.add_argument("--only", action="append", choices=[method.label for method in METHODS])
    args = parser.parse_args()
    methods = tuple(method for method in METHODS if args.only is None or method.label in args.only)
    spec = RunSpec(methods, patterns=tuple(args.pattern or PATTERNS), seeds=(0, 1, 2))
    plugins = load_plugins()
    plugins.add_observer(ProgressPrinter(), "progress")
    results = run(spec, args.out, plugins)
    print(render(results))
    args.json.write_text(json.dumps(summary(results), indent=1) + "\n", encoding="utf-8")


def summary(results: Results) -> dict[str, Any]:
    """The content of the JSON file: the figures of every row, and the settings and versions they depend on."""
    first = results.records[0]
    rows = [{name: record[name] for name in FIGURES if name in record} for record in results.records]
    for row in rows:
        row["notes"].pop("held_out_curve", None)
    return {
        "protocol_digest": first["protocol_digest"],
        "environment": first["environment"],
        "rankings": [line.strip() for line in render(results).splitlines() if "demo@256: " in line],
        "rows": rows,
    }


if __name__ == "__main__":
    main()
