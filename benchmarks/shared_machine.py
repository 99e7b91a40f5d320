"""A learner alone and beside busy processes, with threads that spin while they wait and with threads that sleep.

    python shared_machine.py --json results/shared_machine.json

Times 20 steps of MaskPro on the embedded demo through the command line, which lets threads sleep unless the environment
says otherwise (`ours`); 300,000 turns of a loop are what libgomp does by itself. The conditions take turns, so that
whatever else the machine does falls on all of them. The table shows medians, and every time is in the JSON file. The
seconds are those of the row of the learner, without start of the process and evaluation.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nmbench import load_results
from nmbench.cli.process import WAITING
from nmbench_plugins.demo import DemoPlays

SPINS = 300000  # of libgomp, if nothing is set
OURS = "ours"  # what the command line chooses
BUSY = "while True: pass"
LITTLE = ("--windows", "8", "--pool-tokens", "8192", "--selection-tokens", "4096")  # tokens, so that steps count
TEST_BYTES = 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--spins", nargs="+", default=[str(SPINS), OURS], help="turns of a loop before a thread sleeps")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1], help="numbers of busy processes beside the run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which a run is given up")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    conditions = [(way, busy) for busy in args.busy for way in args.spins]
    times: dict[tuple[str, int], list[float | None]] = {condition: [] for condition in conditions}
    for _ in range(args.rounds):
        for way, busy in conditions:
            times[way, busy].append(learnt_in(way, busy, args))
            print(f"{way}, {busy} busy: {times[way, busy][-1]} s", file=sys.stderr, flush=True)
    rows = [row(way, busy, found) for (way, busy), found in times.items()]
    show(rows)
    if args.json:
        args.json.write_text(json.dumps({**setting(args), "rows": rows}, indent=1) + "\n", encoding="utf-8")


def learnt_in(way: str, busy: int, args: argparse.Namespace) -> float | None:
    """Return the seconds of the learner beside `busy` busy processes; None if it was given up."""
    plain = {name: value for name, value in os.environ.items() if name not in WAITING}
    environment = {**plain, "OMP_NUM_THREADS": str(args.threads), **waiting(way)}
    flags = ["--method", "maskpro", "--set", f"maskpro.steps={args.steps}", *LITTLE, "--quiet", "--device", "cpu"]
    with tempfile.TemporaryDirectory() as folder, beside(busy):
        text = next(iter(DemoPlays().texts("test")))[:TEST_BYTES]
        Path(folder, "test.txt").write_text(text, encoding="utf-8")
        metric = f"ppl:text:{folder}/test.txt@256"
        command = [sys.executable, "-m", "nmbench.cli", "run", *flags, "--metric", metric, "--out", f"{folder}/out"]
        try:
            subprocess.run(command, env=environment, check=True, capture_output=True, timeout=args.timeout)
        except subprocess.TimeoutExpired:
            return None
        rows = {record["label"]: record for record in load_results(f"{folder}/out").records}
    return float(rows["maskpro"]["seconds"]["prune"] - rows["maskpro@init"]["seconds"]["prune"])


@contextlib.contextmanager
def beside(busy: int) -> Iterator[None]:
    """Keep `busy` processes busy while the context is open."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def waiting(spins: str) -> dict[str, str]:
    """Return the environment in which a thread turns a loop `spins` times before it sleeps."""
    return {} if spins == OURS else {"GOMP_SPINCOUNT": spins}


def row(way: str, busy: int, found: list[float | None]) -> dict[str, Any]:
    """Return the times of one condition and their median; a run that was given up counts as infinitely long."""
    median = statistics.median(float("inf") if seconds is None else seconds for seconds in found)
    return {"spins": way, "busy": busy, "median": median if median < float("inf") else None, "seconds": found}


def show(rows: list[dict[str, Any]]) -> None:
    print("| turns before sleep | busy processes beside | median, s | all, s |\n|---|---|---|---|")
    for found in rows:
        listed = ", ".join("given up" if it is None else f"{it:.1f}" for it in found["seconds"])
        median = "-" if found["median"] is None else f"{found['median']:.1f}"
        print(f"| {found['spins']} | {found['busy']} | {median} | {listed} |")


def setting(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the times depend on."""
    import torch

    from nmbench.experiment.environment import cpu_name

    load = os.getloadavg()[2]  # of the last 15 minutes: busy processes of this script are part of it
    about = {"steps": args.steps, "threads": args.threads, "timeout": args.timeout, "load": load}
    return {**about, "cores": os.cpu_count(), "device": cpu_name(), "torch": torch.__version__}


if __name__ == "__main__":
    main()
