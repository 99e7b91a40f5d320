"""What checkpoints, records and progress cost a run, in percent of its time.

    python overhead.py --json results/overhead_demo.json
    python overhead.py --model ./SmolLM2-135M-Instruct --device cuda --dtype bfloat16 --steps 1000 --json smollm2.json

One learner, MaskPro from magnitude, is run again and again in one process, in conditions that take turns:

    bare         checkpoints are dropped, nothing observes the run
    checkpoints  checkpoints as they are by default
    lines        the same with lines of progress and `run.log`
    live         the same with the live view of a terminal, drawn into memory, and `run.log`

The seconds of a run are those between its start, when model and texts are loaded, and its last record. The first round
warms up and does not count. Beside these medians, the seconds inside the calls that store or announce something are
summed up in the condition `live`; their percentage has far less noise than the difference of two medians, but lacks the
thread that draws the live view.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import nmbench
from nmbench.experiment.live import LiveView
from nmbench.experiment.progress import ProgressPrinter
from nmbench.experiment.run_log import log_of
from nmbench.plugins.loading import Plugins, load_plugins
from nmbench.pruning import rows
from nmbench.results.directory import RunDirectory
from nmbench.results.files import FileCheckpoints
from nmbench.results.results import Results
from nmbench.run import run
from nmbench.spec import RunSpec
from nmbench_plugins.demo import DemoPlays

CONDITIONS = ("bare", "checkpoints", "lines", "live")
SIZES = {"windows": 8, "window_tokens": 128, "pool_tokens": 65536, "selection_tokens": 16384}
CALIBRATION, TEST_CHARACTERS = "demo", 8000
WIDTH = 100  # columns of the terminal that the live view is drawn for
TIMED = {  # part of the overhead -> object and name of the function that does it
    "checkpoints": (FileCheckpoints, "save"),
    "masks": (rows, "save_masks"),
    "losses": (rows, "keep_losses"),
    "records": (RunDirectory, "append"),
    "observers": (Plugins, "announce"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="[the default of the model]")
    parser.add_argument("--steps", type=int, default=300, help="steps of the learner; its checkpoints come every 100")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--budget", type=float, default=1500, help="seconds after which no other round begins")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = measured(args)
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of every condition and round, the overheads in percent, and what they depend on."""
    began, seconds = time.monotonic(), {name: list[float]() for name in CONDITIONS}
    parts: list[Mapping[str, float]] = []
    calls: Counter[str] = Counter()
    for number in range(args.rounds + 1):
        if number > 1 and time.monotonic() - began > args.budget:
            break
        order = CONDITIONS if number % 2 else CONDITIONS[::-1]
        for name in order:
            calls.clear()
            taken, inside, results = once(args, name, calls)
            print(f"round {number}, {name}: {taken:.2f} s", file=sys.stderr, flush=True)
            if number:
                seconds[name].append(taken)
            if number and name == "live":
                parts.append({part: spent / taken for part, spent in inside.items()})
                about, counted = environment(results), dict(calls)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    return {
        **{name: getattr(args, name) for name in ("steps", "rounds")},
        "model": Path(args.model).name,
        "environment": about,
        "load": os.getloadavg()[0],
        "seconds": {name: [round(one, 3) for one in found] for name, found in seconds.items()},
        "median_seconds": {name: round(median, 3) for name, median in medians.items()},
        "percent_over_bare": {name: percent(median / medians["bare"] - 1) for name, median in medians.items()},
        "spread_percent": {name: percent(spread(found)) for name, found in seconds.items()},
        "percent_inside_calls": {part: percent(statistics.median(one[part] for one in parts)) for part in TIMED},
        "calls": counted,
    }


def percent(share: float) -> float:
    return round(100 * share, 3)


def spread(seconds: Sequence[float]) -> float:
    """Return the range of repeated times over their median."""
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


def once(args: argparse.Namespace, condition: str, calls: Counter[str]) -> tuple[float, dict[str, float], Results]:
    """Do the run once; return its seconds, the seconds inside the calls of `TIMED`, and its results."""
    inside = dict.fromkeys(TIMED, 0.0)
    plugins, clock = load_plugins(()), Clock()
    plugins.add_observer(clock, "clock")
    with tempfile.TemporaryDirectory() as folder, observed(plugins, condition), contextlib.ExitStack() as patches:
        if condition == "bare":
            patches.enter_context(mock.patch.object(FileCheckpoints, "save", return_value=None))
        for part, (owner, name) in TIMED.items() if condition == "live" else ():
            timed = timing(getattr(owner, name), part, inside, calls)
            patches.enter_context(mock.patch.object(owner, name, timed))
        results = run(spec_of(args, Path(folder)), Path(folder) / "out", plugins)
    if failed := [record["error"] for record in results.records if record["status"] != "ok"]:
        raise SystemExit(failed[0])
    return clock.ended - clock.began, inside, results


class Clock:
    """An observer that takes the times of the start and of the end of a run."""

    began = ended = 0.0

    @nmbench.hookimpl
    def nmbench_run_started(self) -> None:
        self.began = time.perf_counter()

    @nmbench.hookimpl
    def nmbench_run_finished(self) -> None:
        self.ended = time.perf_counter()


def timing(call: Callable[..., Any], part: str, inside: dict[str, float], calls: Counter[str]) -> Callable[..., Any]:
    """Return a function that adds its seconds to `inside[part]`, and counts its calls."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            inside[part] += time.perf_counter() - began
            calls[part] += 1

    return timed


@contextlib.contextmanager
def observed(plugins: Plugins, condition: str) -> Iterator[None]:
    """Observe a run as the condition says: not at all, by lines, or by the live view, drawn into memory."""
    if condition not in ("lines", "live"):
        yield
        return
    log_of(plugins)
    if condition == "lines":
        plugins.add_observer(ProgressPrinter(io.StringIO()), "progress")
        yield
        return
    from rich.console import Console

    view = LiveView(Console(file=io.StringIO(), force_terminal=True, width=WIDTH, color_system="truecolor"))
    plugins.add_observer(view, "progress")
    try:
        yield
    finally:
        view.close()


def spec_of(args: argparse.Namespace, folder: Path) -> RunSpec:
    """Return the specification of the run; its test text is written to `folder`."""
    text = next(iter(DemoPlays().texts("test")))[:TEST_CHARACTERS]
    (folder / "test.txt").write_text(text, encoding="utf-8")
    options = {"init": "magnitude", "steps": args.steps}
    content = {
        **{"model": args.model, "device": args.device, **SIZES, "calibration": CALIBRATION},
        **{"metrics": [f"ppl:text:{folder}/test.txt@128"], "methods": {"maskpro": {"options": options}}},
        **({"dtype": args.dtype} if args.dtype else {}),
    }
    return RunSpec.from_dict(content)


def environment(results: Results) -> dict[str, Any]:
    """Return device and versions of a run."""
    names = ("device", "device_name", "threads", "torch", "transformers", "nmbench", "python", "dtype")
    found: Mapping[str, Any] = results.records[0]["environment"]
    return {name: found.get(name) for name in names}


def table(found: Mapping[str, Any]) -> str:
    """Return the medians, and the seconds inside calls, as two tables."""
    lines = ["| condition | median, s | over bare | range |", "|---|---|---|---|"]
    for name in CONDITIONS:
        over, range_ = found["percent_over_bare"][name], found["spread_percent"][name]
        lines.append(f"| {name} | {found['median_seconds'][name]:.2f} | {over:+.2f} % | {range_:.1f} % |")
    lines += ["", "| inside the calls for | share of the time | calls |", "|---|---|---|"]
    for part in TIMED:
        share, count = found["percent_inside_calls"][part], found["calls"].get(part, 0)
        lines.append(f"| {part} | {share:.3f} % | {count} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
