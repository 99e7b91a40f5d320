"""Kills of a real run at every file operation and at random moments; the resumed run must end as one left alone.

    python kill_test.py --every 1 --random 100 --workers 16 --json results/kill_test.json
    python kill_test.py --model tiny:llama --every 7 --random 0
    python kill_test.py --model tiny:llama --every 0 --random 120 --steps 200 --after 0.5    most within the learner

A shim counts the calls of `os.fsync`, `os.replace` and `os.unlink` in the process of the command, and kills it by
SIGKILL before the k-th, or after the k-th, which leaves temporary files, whole files that no record names, and records
whose checkpoints are not removed yet. Every point has a directory of its own. After the kill the same command is given
until it ends. The masks and losses must be equal byte for byte, and the records in all but times, memory and their own
identity; no finished row may be done again, and no temporary file may be left. Random kills come at uniformly drawn
moments of the time of a whole run, or of its part after the share `--after`, which spares the loading. The phase of a
kill is the file operation, or the last event that was announced.

`--workers K` does K kills at once. A command that takes longer than `--limit` seconds is ended, and counts as a
difference. Results are stored after every kill, so that an interrupted harness (Ctrl-C, SIGTERM, `--budget`) says what
it had.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nmbench_plugins.demo import DemoPlays

SHIM = """
import os, signal, sys
point, count = int(os.environ["KILL_AT"]), [0]
phases = os.open(os.environ["KILL_PHASE"], os.O_WRONLY | os.O_CREAT)
def phase(text):
    os.pwrite(phases, text.encode().ljust(200), 0)
def kind(path):
    parts = str(path).split(os.sep)
    if parts[-2:-1] and parts[-2] in KINDS: return parts[-2]
    names = parts[-1].lstrip(".").split(".")
    if len(names[-1]) == 32: names.pop()  # of a temporary file
    return ".".join(names) if len(names) > 1 else "a folder or file"
KINDS = ("masks", "losses", "checkpoints", "errors", "weights")
def target(name, args):
    if name == "fsync":
        link = f"/proc/self/fd/{args[0]}"
        return os.readlink(link) if os.path.exists(link) else "a.file"
    return args[-1] if name == "replace" else args[0]
def counted(name, call):
    def at(when, about):
        count[0] += 1
        if count[0] == point:
            phase(f"{when} {name} of {about}")
            os.kill(os.getpid(), signal.SIGKILL)
    def counting(*args, **kwargs):
        about = kind(target(name, args))
        at("before", about)
        result = call(*args, **kwargs)
        at("after", about)
        return result
    return counting
for name in ("fsync", "replace", "unlink"):
    setattr(os, name, counted(name, getattr(os, name)))
import pathlib
phase("importing")
from nmbench.cli import main
from nmbench.plugins.loading import Plugins
announce = Plugins.announce
def announced(self, hook, **about):
    event = about.get("event")
    phase(f"{event.job.split()[0] or 'run'}: {event.stage}" if event else hook.removeprefix("nmbench_"))
    return announce(self, hook, **about)
Plugins.announce = announced
phase("loading")
try:
    main(sys.argv[1:])
finally:
    print("points", count[0], file=sys.stderr)
"""
METHODS = ("--method", "wanda", "--method", "maskpro")
STEPS = ("--set", "maskpro.checkpoint_every=2")
SIZES = ("--windows", "4", "--window-tokens", "64", "--pool-tokens", "2048", "--selection-tokens", "1024")
FREE = ("seconds", "peak_bytes", "copied_from")  # of a record: times, memory; rows are copied in one process only
TEXTS = (("cal", "calibration", 20_000), ("test", "test", 6_000))  # name, split, characters
NEVER = 10**9


@dataclass(frozen=True)
class Kill:
    """One kill: before or after a file operation (`point`), or after so many seconds (`moment`)."""

    name: str
    point: int = NEVER
    moment: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of one kill: `phase`: what the run did when it was killed; `seconds`: of both commands."""

    name: str
    killed: bool
    phase: str
    seconds: float
    differences: Sequence[str]


@dataclass
class Harness:
    """The command under test, its folder and limits, and every process that is running now."""

    command: Sequence[str]
    folder: Path
    limit: float
    threads: int | None = None
    running: set[subprocess.Popen[str]] = field(default_factory=set)

    def run(self, out: str, kill: Kill = Kill("whole")) -> tuple[int, str]:
        """Give the command into the directory `out`; return its exit code and what it said on standard error."""
        threads = {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}
        about = {"KILL_AT": str(kill.point), "KILL_PHASE": str(self.folder / f"{out}.phase")}
        program = [sys.executable, "-c", SHIM, *self.command, "--out", str(self.folder / out)]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        process = subprocess.Popen(program, env={**threads, **os.environ, **about}, **pipes)
        self.running.add(process)
        try:
            return self.ended(process, kill)
        finally:
            self.running.discard(process)

    def ended(self, process: subprocess.Popen[str], kill: Kill) -> tuple[int, str]:
        """Wait for the end of a process, which comes at the moment of the kill or at the limit at the latest."""
        try:
            _, said = process.communicate(timeout=self.limit if kill.moment is None else kill.moment)
        except subprocess.TimeoutExpired:
            process.kill()
            _, said = process.communicate()
            if kill.moment is None:
                return 124, f"it took longer than {self.limit:.0f} s"
        return process.returncode, said

    def stop(self) -> None:
        """Kill every running process."""
        for process in list(self.running):
            process.kill()


def main() -> None:
    args = parser().parse_args()
    signal.signal(signal.SIGTERM, interrupted)
    with tempfile.TemporaryDirectory() as folder:
        result = harness(args, Path(folder))
    print(table(result))
    sys.exit(bool(result["differences"]) or 2 * (not result["complete"]))


def parser() -> argparse.ArgumentParser:
    """Return the options of the script."""
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("--model", default="demo")
    found.add_argument("--every", type=int, default=1, help="kill at every so many points; 0: at none")
    found.add_argument("--random", type=int, default=10, help="kills at random moments")
    found.add_argument("--after", type=float, default=0.0, help="share of a run that passes before any of them")
    found.add_argument("--steps", type=int, default=6, help="of MaskPro")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--workers", type=int, default=1, help="kills at once; several have one thread each")
    found.add_argument("--limit", type=float, default=300, help="seconds after which a command is given up")
    found.add_argument("--budget", type=float, help="seconds after which no other kill begins")
    found.add_argument("--json", type=Path)
    return found


def interrupted(*_: object) -> None:
    """End the harness as Ctrl-C does."""
    raise KeyboardInterrupt


def harness(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Do all kills in `folder`; return what came of them. Ctrl-C ends it with what it has."""
    bench = Harness(flags(args.model, args.steps, folder), folder, args.limit, 1 if args.workers > 1 else None)
    began, outcomes = time.monotonic(), list[Outcome]()
    points, whole_seconds, unlike = wholes(bench, args.workers)
    kills = chosen(args, points, whole_seconds)

    def stored() -> dict[str, Any]:
        about = {**setting(args), "points": points, "whole_seconds": round(whole_seconds, 2), "planned": len(kills)}
        result = {**about, "seconds": round(time.monotonic() - began, 1), **summary(outcomes, unlike, len(kills))}
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return result

    end = None if args.budget is None else began + args.budget
    with contextlib.suppress(KeyboardInterrupt):
        for outcome in done(bench, kills, args.workers, end):
            outcomes.append(outcome)
            what = f"killed in {outcome.phase}" if outcome.killed else "had ended"
            print(f"{outcome.name}: {what}, {outcome.differences or 'the same'}", file=sys.stderr, flush=True)
            stored()
    return stored()


def wholes(bench: Harness, count: int) -> tuple[int, float, list[str]]:
    """Do the run `count` times at once and undisturbed, as slow as the kills will be.

    Return the points of a run, its median seconds, and the differences of these runs. Raises `SystemExit` if one fails.
    """

    def whole(number: int) -> tuple[float, int, str]:
        began = time.monotonic()
        code, said = bench.run(f"whole{number}")
        return time.monotonic() - began, code, said

    with ThreadPoolExecutor(count) as pool, stopping(bench):
        found = list(pool.map(whole, range(count)))
    for _, code, said in found:
        if code:
            raise SystemExit(said)
    first, *others = (bench.folder / f"whole{number}" for number in range(count))
    unlike = [f"{other.name}: {difference}" for other in others for difference in compared(first, other)]
    return int(found[0][2].rsplit("points", 1)[1]), statistics.median(seconds for seconds, _, _ in found), unlike


def chosen(args: argparse.Namespace, points: int, seconds: float) -> list[Kill]:
    """Return the kills: at every `--every`th point, and at `--random` moments of the seconds of a whole run."""
    draw = random.Random(args.seed)
    at_points = range(1, points + 1, args.every) if args.every else ()
    at_moments = (draw.uniform(args.after * seconds, seconds) for _ in range(args.random))
    return [Kill(f"point{point}", point) for point in at_points] + [
        Kill(f"moment{number}", moment=moment) for number, moment in enumerate(at_moments)
    ]


def done(bench: Harness, kills: Sequence[Kill], workers: int, end: float | None) -> Iterator[Outcome]:
    """Yield what comes of every kill, `workers` at once; after the time `end` no other kill begins."""
    waiting, running = list(kills), set[Future[Outcome]]()
    with ThreadPoolExecutor(workers) as pool, stopping(bench):
        while waiting or running:
            if end is not None and time.monotonic() > end:
                waiting.clear()
            while waiting and len(running) < workers:
                running.add(pool.submit(outcome_of, bench, waiting.pop(0)))
            ready, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in ready)


@contextlib.contextmanager
def stopping(bench: Harness) -> Iterator[None]:
    """Kill all running processes if the context is left by an exception, so that threads which wait for them end."""
    try:
        yield
    except BaseException:
        bench.limit = 0.0
        bench.stop()
        raise


def outcome_of(bench: Harness, kill: Kill) -> Outcome:
    """Kill a run, give its command again, and compare; the directory is removed if it is the same as a whole run's."""
    began = time.monotonic()
    out = bench.folder / kill.name
    code, said = bench.run(kill.name, kill)
    killed = code == -signal.SIGKILL
    phase = (content(bench.folder / f"{kill.name}.phase") or b"").decode().strip("\0 ")
    differences = [] if killed or code == 0 else [f"failed before the kill: {last_line(said)}"]
    differences += resumed(bench, kill.name)
    if not differences:
        shutil.rmtree(out)
    return Outcome(kill.name, killed, phase or "starting Python", round(time.monotonic() - began, 2), differences)


def resumed(bench: Harness, name: str) -> list[str]:
    """Give the command once more; return what differs from a whole run. Records of finished rows stay as they are."""
    path = bench.folder / name / "records.jsonl"
    before = path.read_bytes() if path.exists() else b""
    code, said = bench.run(name)
    if code:
        return [f"did not go on: {last_line(said)}"]
    finished = before[: before.rfind(b"\n") + 1]
    changed = [] if path.read_bytes().startswith(finished) else ["records of finished rows changed"]
    return changed + list(compared(bench.folder / "whole0", bench.folder / name))


def last_line(said: str) -> str:
    """Return the last line of what a command said."""
    return (said.strip().splitlines() or ["nothing was said"])[-1]


def flags(model: str, steps: int, folder: Path) -> list[str]:
    """Write small texts to `folder`; return the flags of the run."""
    for name, split, length in TEXTS:
        (folder / f"{name}.txt").write_text(next(iter(DemoPlays().texts(split)))[:length], encoding="utf-8")
    text = ["--calibration", f"text:{folder}/cal.txt", "--metric", f"ppl:text:{folder}/test.txt@64"]
    length = ("--set", f"maskpro.steps={steps}")
    return ["run", "--model", model, *METHODS, *length, *STEPS, *SIZES, *text, "--device", "cpu", "--quiet"]


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


def setting(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the kills depend on."""
    import torch

    from nmbench.experiment.environment import cpu_name

    asked = {
        name: getattr(args, name) for name in ("model", "every", "random", "after", "steps", "seed", "workers", "limit")
    }
    return {**asked, "cores": os.cpu_count(), "device": cpu_name(), "torch": torch.__version__}


def summary(outcomes: Sequence[Outcome], unlike: Sequence[str], planned: int) -> dict[str, Any]:
    """Return the counts of kills, in all and by phase, and every difference."""
    kills = [one for one in outcomes if one.killed]
    differences = [f"{one.name}: {difference}" for one in outcomes for difference in one.differences]
    return {
        "complete": len(outcomes) == planned,
        "kills": len(kills),
        "ended_before_the_kill": len(outcomes) - len(kills),
        "differences": [*unlike, *differences],
        "at_file_operations": counts(one for one in kills if one.name.startswith("point")),
        "at_random_moments": counts(one for one in kills if one.name.startswith("moment")),
        "outcomes": [asdict(one) for one in outcomes],
    }


def counts(kills: Iterable[Outcome]) -> dict[str, int]:
    """Return the number of kills by phase, the most frequent first."""
    return dict(Counter(one.phase for one in kills).most_common())


def table(result: dict[str, Any]) -> str:
    """Return the kills by phase and, last, their number and the differences."""
    phases = [*result["at_file_operations"].items(), *result["at_random_moments"].items()]
    lines = ["| killed in | kills |", "|---|---|", *(f"| {phase} | {count} |" for phase, count in phases)]
    found = f"{result['kills']} kills, {len(result['differences'])} differences, {result['points']} points in a run"
    done = result["kills"] + result["ended_before_the_kill"]
    cut = "" if result["complete"] else f"; ended after {done} of {result['planned']} planned kills"
    return "\n".join([*lines, *result["differences"], found + cut])


if __name__ == "__main__":
    main()
