"""Kills of a real run at every file operation and at random moments; the resumed run must end as one left alone.

    python kill_test.py --every 1 --random 100 --json results/kill_test.json
    python kill_test.py --model tiny:llama --every 7 --random 0

A shim counts the calls of `os.fsync`, `os.replace` and `os.unlink` in the process of the command, and kills it by
SIGKILL before the k-th, or after the k-th, which leaves temporary files, whole files that no record names, and records
whose checkpoints are not removed yet. Every point has a directory of its own. After the kill the same command is given
until it ends. The masks and losses must be equal byte for byte, and the records in all but times, memory and their own
identity; no finished row may be done again, and no temporary file may be left. Random kills come at uniformly drawn
moments of the time of a whole run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nmbench_plugins.demo import DemoPlays

SHIM = """
import os, signal, sys
point, count = int(os.environ["KILL_AT"]), [0]
def counted(call):
    def counting(*args, **kwargs):
        count[0] += 1
        if count[0] == point: os.kill(os.getpid(), signal.SIGKILL)
        result = call(*args, **kwargs)
        count[0] += 1
        if count[0] == point: os.kill(os.getpid(), signal.SIGKILL)
        return result
    return counting
for name in ("fsync", "replace", "unlink"):
    setattr(os, name, counted(getattr(os, name)))
import pathlib
from nmbench.cli import main
try:
    main(sys.argv[1:])
finally:
    print("points", count[0], file=sys.stderr)
"""
METHODS = ("--method", "wanda", "--method", "maskpro")
STEPS = ("--set", "maskpro.steps=6", "--set", "maskpro.checkpoint_every=2")
SIZES = ("--windows", "4", "--window-tokens", "64", "--pool-tokens", "2048", "--selection-tokens", "1024")
FREE = ("seconds", "peak_bytes", "copied_from")  # of a record: times, memory; rows are copied in one process only
TEXTS = (("cal", "calibration", 20_000), ("test", "test", 6_000))  # name, split, characters
NEVER = 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--every", type=int, default=1, help="kill at every so many points; 0: at none")
    parser.add_argument("--random", type=int, default=10, help="kills at random moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = harness(args, Path(folder))
    print(f"{result['kills']} kills, {len(result['differences'])} differences, {result['points']} points in a run")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(result["differences"]))


def harness(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Do all kills in `folder`; return their number and every difference."""
    command = flags(args.model, folder)
    began = time.monotonic()
    whole = started(command, folder / "whole", NEVER)
    _, said = whole.communicate()
    seconds = time.monotonic() - began
    if whole.returncode:
        raise SystemExit(said)
    points = int(said.rsplit("points", 1)[1])
    chosen = range(1, points + 1, args.every) if args.every else ()
    differences, kills = [], 0
    for name, killed in [*at_points(command, folder, chosen), *at_moments(command, folder, args, seconds)]:
        kills += killed
        found = list(compared(folder / "whole", resumed(command, folder / name)))
        differences += [f"{name}: {difference}" for difference in found]
        print(f"{name}: {'killed' if killed else 'had ended'}, {found or 'the same'}", file=sys.stderr, flush=True)
    return {"model": args.model, "points": points, "kills": kills, "differences": differences, "whole_seconds": seconds}


def flags(model: str, folder: Path) -> list[str]:
    """Write small texts to `folder`; return the flags of the run."""
    for name, split, length in TEXTS:
        (folder / f"{name}.txt").write_text(next(iter(DemoPlays().texts(split)))[:length], encoding="utf-8")
    text = ["--calibration", f"text:{folder}/cal.txt", "--metric", f"ppl:text:{folder}/test.txt@64"]
    return ["run", "--model", model, *METHODS, *STEPS, *SIZES, *text, "--device", "cpu", "--quiet"]


def started(command: Sequence[str], out: Path, point: int) -> subprocess.Popen[str]:
    """Start the command into `out`; it is killed at `point`."""
    environment = {**os.environ, "KILL_AT": str(point)}
    program = [sys.executable, "-c", SHIM, *command, "--out", str(out)]
    return subprocess.Popen(
        program, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def at_points(command: Sequence[str], folder: Path, points: Sequence[int]) -> Iterator[tuple[str, bool]]:
    """Yield the name of a directory for every point, and whether its run was killed there."""
    for point in points:
        process = started(command, folder / f"point{point}", point)
        process.communicate()
        yield f"point{point}", process.returncode == -9


def at_moments(
    command: Sequence[str], folder: Path, args: argparse.Namespace, seconds: float
) -> Iterator[tuple[str, bool]]:
    """Yield the name of a directory for every random moment, and whether its run was killed before its end."""
    draw = random.Random(args.seed)
    for number in range(args.random):
        process = started(command, folder / f"moment{number}", NEVER)
        try:
            process.communicate(timeout=draw.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        yield f"moment{number}", process.returncode == -9


def resumed(command: Sequence[str], out: Path) -> Path:
    """Give the command once more; it must end well. Records of rows that were finished stay as they are."""
    path = out / "records.jsonl"
    before = path.read_bytes() if path.exists() else b""
    process = started(command, out, NEVER)
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"{out.name} did not go on: {said}")
    whole = before[: before.rfind(b"\n") + 1]
    if not path.read_bytes().startswith(whole):
        raise SystemExit(f"{out.name}: records of finished rows changed")
    return out


def compared(expected: Path, found: Path) -> Iterator[str]:
    """Yield every difference between two run directories."""
    for kind in ("masks", "losses"):
        names = {path.name for folder in (expected, found) for path in (folder / kind).iterdir()}
        for name in sorted(names):
            if content(expected / kind / name) != content(found / kind / name):
                yield f"{kind}/{name}"
    if records(expected) != records(found):
        yield "records.jsonl"
    if left := [path.name for path in found.rglob(".*") if path.name != ".lock"]:
        yield f"left: {left}"
    if left := [path.name for path in found.glob("checkpoints/*")]:
        yield f"checkpoints: {left}"


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def records(directory: Path) -> list[dict[str, Any]]:
    """Return the records in order, without times and memory; a row that was done twice is there twice."""
    lines = (directory / "records.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in FREE} for line in lines]


if __name__ == "__main__":
    main()
