"""Tokens a second of learners and walks that 1, 2 and 4 ranks share.

    python ranks.py --ranks 1 2 4 --model FOLDER --json results/ranks_smollm2_h100x4.json
    python ranks.py --ranks 1 2 4 --shape llama-3.1-8b --methods maskpro --json results/ranks_8b_h100x4.json
    python ranks.py --ranks 1 2 4 --shape smollm2-135m --methods wanda sparsegpt --window-tokens 2048
    python ranks.py --ranks 1 2 4 --shape llama-3.1-8b --blocks 8 --methods wanda sparsegpt --window-tokens 2048
    python ranks.py --ranks 1 2 --shape tiny --device cpu --minibatch 2 --window-tokens 16 --steps 2 --warm-up 1

Every number of ranks is started once by torchrun, or as one process, and runs each method on random tokens.

Learners, at a fixed minibatch per rank and at a fixed one in all: steps are timed between two points where the device
is idle, after `--warm-up` steps; loading, captures of CUDA graphs, compilation, measurements and checkpoints are not
counted. Tokens are those of the minibatches of all ranks, read once.

Walks (`wanda`, `sparsegpt`) of `--windows` windows in all: `prune_one_shot` from a moment when all ranks are ready
until the last one is done, the median of `--repeats`, after one that compiles. The measurement of a row, which rank 0
makes alone, is not counted. `making`: the seconds in which rank 0 calls the method for its layers, in a repeat of its
own in which the device is waited for at every call, so that the rest of `seconds` is the walk and the exchange.

`masks`: the digest of the masks of MaskPro, equal if the ranks of a fixed minibatch in all decided as one process, and
of those of walks, which differ where sums of statistics round to another side.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES

from nmbench import Pattern
from nmbench.experiment.environment import cpu_name, version
from nmbench.runtime.ranks import Launch, joined, sharing_by

WALKS = ("wanda", "sparsegpt")
LEARNERS = ("maskpro", "soft")


def main() -> None:
    args = arguments()
    if args.worker:
        work(args)
        return
    rows = [row for ranks in args.ranks for row in started(ranks, sys.argv[1:])]
    for row in with_ratios(rows):
        print(json.dumps(row))
    if args.json:
        gpu = args.device != "cpu" and torch.cuda.is_available()
        versions = {package: version(package) for package in ("torch", "transformers", "triton")}
        about = {"device": torch.cuda.get_device_name() if gpu else cpu_name(), **versions}
        about |= {"model": args.shape or Path(args.model).name, "blocks": args.blocks, "pattern": str(args.pattern)}
        args.json.write_text(json.dumps({**about, "rows": with_ratios(rows)}, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--methods", nargs="+", default=LEARNERS, choices=[*LEARNERS, *WALKS])
    parser.add_argument("--model")
    parser.add_argument("--shape", choices=sorted(SHAPES))
    parser.add_argument("--blocks", type=int, help="fewer than the shape has")
    parser.add_argument("--pattern", type=Pattern.parse, default=Pattern(2, 4))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--minibatch", type=int, default=16, help="windows: of a rank, and in all")
    parser.add_argument("--window-tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--windows", type=int, default=128, help="of a walk")
    parser.add_argument("--repeats", type=int, default=3, help="of a walk")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if (args.model is None) == (args.shape is None):
        parser.error("give --model or --shape")
    return args


def started(ranks: int, flags: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of one number of ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "rows.json")
        command = [sys.executable, *(torchrun if ranks > 1 else []), __file__, *flags, "--worker", str(out)]
        print(f"{ranks} ranks", flush=True)
        subprocess.run(command, check=True)
        return list(json.loads(out.read_text(encoding="utf-8")))


def with_ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the ratio of tokens a second to those of one rank; one rank stands for both modes."""
    alone = {row["method"]: row["tokens_per_second"] for row in rows if row["ranks"] == 1}
    return [
        {**row, "ratio": round(row["tokens_per_second"] / alone[row["method"]], 3) if row["method"] in alone else None}
        for row in rows
    ]


def work(args: argparse.Namespace) -> None:
    """Learn and walk as one rank; rank 0 writes the rows."""
    with joined(Launch.of(), args.device) as ranks, sharing_by(ranks):
        import ranks_work  # and with it transformers, which may use CUDA: this rank has its GPU by now

        rows = ranks_work.rows(args, ranks)
        if ranks.leads:
            args.worker.write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
