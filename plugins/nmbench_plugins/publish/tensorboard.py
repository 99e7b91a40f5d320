"""Event files for TensorBoard, while a run goes on and afterwards. Needs tensorboardX, `nmbench[tensorboard]`.

Each row is a run of TensorBoard, a folder below `tensorboard/`: figures of a learner by step under `learn/`, final
figures under `metric/` and `cost/`, and the options with the metrics as hyperparameters. Nothing leaves the machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import nmbench

FOLDER, EVENTS = "tensorboard", "events.out.tfevents.*"
LEARN = "learn"  # the stage of a learner's own reports, which a record keeps as its curve
FLUSH_SECONDS = 5
MISSING = "TensorBoard's files need tensorboardX, which is not installed: pip install 'nmbench[tensorboard]'."


class Tensorboard(nmbench.Reporter):
    """`tensorboard/`: event files with curves, metrics, cost and options of every row."""

    def write(self, results: nmbench.Results, directory: Path) -> Path:
        library()
        path = directory / FOLDER
        for record in results.records:
            if record["status"] == "ok":
                run = Path(record.get("directory", "")).name
                write_row(path / run / folder_of(title(record)), record)
        return path

    def observer(self) -> object:
        library()
        return Follower()


class Follower:
    """An observer that writes the figures of a learner when they are reported, and those of a row when it is done."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.job, self.writer = "", None

    @nmbench.hookimpl
    def nmbench_run_started(self, directory: Path) -> None:
        self.folder = directory / FOLDER

    @nmbench.hookimpl
    def nmbench_progress(self, event: nmbench.Progress) -> None:
        if not event.values or self.folder is None:
            return
        if event.job != self.job or self.writer is None:
            self.close()
            self.job, self.writer = event.job, opened(self.folder / folder_of(event.job), event.done)
        add(self.writer, {f"{event.stage}/{name}": value for name, value in event.values.items()}, event.done)

    @nmbench.hookimpl
    def nmbench_method_finished(self, record: Mapping[str, Any]) -> None:
        name = title(record)
        followed = name == self.job
        self.close()
        if record["status"] == "ok" and self.folder is not None:
            writer = opened(self.folder / folder_of(name))
            add_row(writer, record, curve=not followed)  # rows of other processes have no progress here
            writer.close()

    @nmbench.hookimpl
    def nmbench_run_finished(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the file of the row at work."""
        if self.writer is not None:
            self.writer.close()
        self.job, self.writer = "", None


def library() -> ModuleType:
    """Return tensorboardX. Raises `NMBenchError` if it is missing."""
    try:
        import tensorboardX
    except ImportError as error:
        raise nmbench.NMBenchError(MISSING) from error
    return tensorboardX


def opened(folder: Path, step: int | None = None) -> Any:
    """Return a writer of one more event file; steps from `step` on of earlier files, which a kill left, are hidden."""
    known = step is not None and any(folder.glob(EVENTS))
    writer = library().FileWriter(str(folder), flush_secs=FLUSH_SECONDS, filename_suffix=f".{count(folder)}")
    if known:
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step)
    return writer


def count(folder: Path) -> int:
    """Return the number of event files, which tells files of one second apart."""
    return sum(1 for _ in folder.glob(EVENTS))


def write_row(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the event file of one row in the place of those that are there."""
    for old in folder.glob(EVENTS):
        old.unlink()
    writer = opened(folder)
    add_row(writer, record, curve=True)
    writer.close()


def add_row(writer: Any, record: Mapping[str, Any], curve: bool) -> None:
    """Add metrics, cost and options of a row, and its curve."""
    from tensorboardX.summary import hparams

    for point in record["curve"] if curve else ():
        values = {f"{LEARN}/{name}": value for name, value in point.items() if name != "step" and value is not None}
        add(writer, values, int(point["step"]))
    metrics = {f"metric/{name}": figures["value"] for name, figures in record["metrics"].items()}
    add(writer, metrics, 0)
    add(writer, {f"cost/{name}": value for name, value in costs(record) if value is not None}, 0)
    for part in hparams(options_of(record), {tag(name): value for name, value in metrics.items()}):
        writer.add_summary(part)


def costs(record: Mapping[str, Any]) -> Iterable[tuple[str, float | None]]:
    """Return the cost of a row by name: seconds, tokens, bytes."""
    yield "prune_seconds", record["seconds"]["prune"]
    yield from record["cost"].items()
    yield "peak_device_bytes", record["peak_bytes"]["device"]


def options_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return method, pattern, seed and options of a row as hyperparameters."""
    plain = {name: record[name] for name in ("label", "method", "pattern", "seed", "model")}
    every = {**plain, **{f"option.{name}": value for name, value in record["options"].items()}}
    return {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in every.items()
        if value is not None
    }


def add(writer: Any, values: Mapping[str, float], step: int) -> None:
    """Add figures at one step under tags that TensorBoard takes, with their own names to display."""
    from tensorboardX.summary import scalar

    for name, value in values.items():
        writer.add_summary(scalar(tag(name), value, display_name=name), step)


def tag(name: str) -> str:
    """Return a name in the characters of a tag: `metric/ppl_demo_256`."""
    return re.sub(r"[^-/\w.]", "_", name)


def title(record: Mapping[str, Any]) -> str:
    """Return the name of a row, which is that of its job in progress events: `wanda 2:4 seed 0`."""
    seed = None if record["seed"] is None else f"seed {record['seed']}"
    return " ".join(filter(None, (record["label"], record["pattern"], seed)))


def folder_of(name: str) -> str:
    """Return the folder of a row: `wanda_2-4_seed_0`."""
    return name.replace(" ", "_").replace(":", "-")
