r"""How many windows does a learner need? Training loss, held-out loss, share of the mask changed, confirmed or not.

    python few_windows.py --learner flips --out runs/few-flips --jobs local:8 --json results/few_windows_flips_demo.json
    python few_windows.py --learner flips --model ./smollm2-135m-instruct --config smollm2.toml --device cuda \
        --calibration jsonl:calibration.jsonl --metric ppl:text:wiki.valid.txt@2048 --out runs/few --json few.json

Makes one row for every number of windows and seed in one run directory; the same command goes on with a run that was
ended. Then the losses of every learnt mask and of its start are measured on the very windows that the learner read, the
first ones of the pool, and on the half of the selection windows that nothing was chosen by. `flips` reads its
`--steps` whatever the number of windows; `maskpro` with the preset `--preset`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from finished_rows import experiment_of, task_of
from torch import Tensor

from nmbench import LearnTask, Pattern, RunSpec
from nmbench.evaluation import losses_in_parts
from nmbench.plain_data import read_toml
from nmbench.results.address import file_name
from nmbench.results.files import load_masks
from nmbench.run import run
from nmbench.workers.asked import workers_of

WINDOW, ALL = 128, "all"  # tokens of a window; the label of the whole pool
MOST = 1024  # windows that the training loss of a larger pool is measured on
MINIBATCH = 32
COLUMNS = ("windows", "seed", "training loss", "held-out loss", "groups changed", "steps taken", "returned", "seconds")


def main() -> None:
    args = parser().parse_args()
    workers = workers_of(args.jobs, {}, quiet=True) if args.jobs else None
    results = run(RunSpec.from_dict(content(args)), args.out, workers=workers)
    rows = measured(results.records, args)
    print(table(rows))
    if args.json:
        environment = results.records[0]["environment"]
        whole = {"learner": args.learner, "model": Path(args.model).name, "environment": environment, "rows": rows}
        args.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """Return the options of the script."""
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("--learner", choices=("flips", "maskpro"), default="flips")
    found.add_argument("--init", default="swaps", help="whose mask is the start")
    found.add_argument(
        "--windows", nargs="+", default=["1", "16", "128", "512", ALL], help="numbers of windows, or all"
    )
    found.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    found.add_argument("--steps", type=int, help="of the learner  [its default]")
    found.add_argument("--preset", help="of maskpro")
    found.add_argument("--model", default="demo")
    found.add_argument("--config", type=Path, help="TOML of the run; its methods and seeds do not count")
    found.add_argument("--calibration")
    found.add_argument("--metric", action="append")
    found.add_argument("--device", default="cpu")
    found.add_argument("--dtype")
    found.add_argument("--jobs", help="local:K: K processes do the rows")
    found.add_argument("--out", type=Path, required=True, help="the run directory")
    found.add_argument("--json", type=Path)
    return found


def content(args: argparse.Namespace) -> dict[str, Any]:
    """Return the run as plain data: a method for every number of windows, on the same start."""
    given = {"calibration": args.calibration, "metrics": args.metric, "dtype": args.dtype}
    shared = {"init": args.init, "steps": args.steps, "preset": args.preset, "window_tokens": WINDOW}
    shared = {name: value for name, value in shared.items() if value is not None}
    methods: dict[str, Any] = {args.init: {}}
    for count in args.windows:
        few = {} if count == ALL else {"pool_windows": int(count)}
        methods[label(args, count)] = {"method": args.learner, "options": {**shared, **few}}
    return {
        **(read_toml(args.config) if args.config else {}),
        **{name: value for name, value in given.items() if value},
        **{"model": args.model, "device": args.device, "seeds": args.seeds, "patterns": ["2:4"], "methods": methods},
    }


def label(args: argparse.Namespace, count: str) -> str:
    """Return the label of the row that reads so many windows: `flips-16`."""
    return f"{args.learner}-{count}"


@torch.no_grad()
def measured(records: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for every record of the learner."""
    experiment = experiment_of(args.out, args.device, args.dtype)
    found = []
    for seed in args.seeds:
        own = {record["label"]: record for record in records if record["seed"] == seed}
        start = args.out / "masks" / f"{file_name(args.init, '2:4', seed)}.safetensors"
        task = task_of(experiment, start, Pattern.parse("2:4"), seed)
        found += [row(task, own[label(args, count)], count, args.out) for count in args.windows]
    return found


def row(task: LearnTask, record: Mapping[str, Any], count: str, out: Path) -> dict[str, Any]:
    """Return the figures of one learner's row; losses are those of the start and of the learnt mask, in nats."""
    about = {"windows": count, "seed": record["seed"], "status": record["status"]}
    if record["status"] != "ok":
        return {**about, "error": record["error"]}
    learnt = load_masks(out / "masks" / f"{file_name(record['label'], '2:4', record['seed'])}.safetensors")
    read = task.windows(WINDOW)[: MOST if count == ALL else int(count)]
    unseen = task.selection[len(task.selection) // 2 :]
    notes = record["notes"]
    return {
        **about,
        "training": [mean_loss(task, masks, read) for masks in (task.initial, learnt)],
        "held_out": [mean_loss(task, masks, unseen) for masks in (task.initial, learnt)],
        "metrics": {name: value["value"] for name, value in record["metrics"].items()},
        "groups_changed": notes.get("groups_changed"),
        "steps_taken": notes.get("steps_taken"),
        "returned": notes.get("returned"),
        "confirmation": notes.get("confirmation"),
        "forward_tokens": record["cost"]["forward_tokens"],
        "seconds": record["seconds"]["prune"],
    }


def mean_loss(task: LearnTask, masks: Mapping[str, Tensor], windows: Tensor) -> float:
    """Return the mean loss of windows under masks."""
    with task.live_weights() as live:
        live.apply(masks)
        return float(losses_in_parts(task.loss, windows, MINIBATCH).double().mean())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    return "\n".join([f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *map(line, rows)])


def line(row: Mapping[str, Any]) -> str:
    """Return one row of the table."""
    if row["status"] != "ok":
        return f"| {row['windows']} | {row['seed']} | FAILED: {row['error']} |"
    losses = (f"{before:.3f} -> {after:.3f}" for before, after in (row["training"], row["held_out"]))
    taken = "-" if row["steps_taken"] is None else row["steps_taken"]
    rest = (f"{row['groups_changed']:.2%}", taken, row["returned"], f"{row['seconds']:.0f}")
    return f"| {' | '.join(map(str, (row['windows'], row['seed'], *losses, *rest)))} |"


if __name__ == "__main__":
    main()
