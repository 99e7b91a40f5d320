"""The run directory: what is finished, how to repeat it, and its rows as a pandas frame.

`records.jsonl` is the truth: one line per finished job, appended and fsynced before anyone is told. Everything else can
be made again from it, or by running the same command.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import tomli_w

from nmbench.errors import NMBenchError, RunMismatch
from nmbench.options import read
from nmbench.spec import MethodSpec, RunSpec, read_toml
from nmbench.store import cannot_write, write_atomic

if TYPE_CHECKING:
    import pandas

Record = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """The rows of one or more run directories, newest record of each job, in the order of the table.

    `asked` holds the rows that the command at hand asked for, whether it made them or found them finished.
    """

    records: Sequence[Record]
    directories: Sequence[Path]
    asked: Sequence[Record] = ()

    def tidy(self) -> pandas.DataFrame:
        """One row per job and metric; `nmbench.frames.TIDY` says what the columns hold and in which units."""
        from nmbench.frames import tidy

        return tidy([{"directory": str(self.directories[0]), **record} for record in self.records])

    def frame(self) -> pandas.DataFrame:
        """One row per job; nested fields become dotted columns such as `seconds.prune` or `cost.forward_tokens`.

        `nmbench.frames.WIDE` says what the columns hold and in which units.
        """
        from nmbench.frames import wide

        return wide(self.records)

    def details(self) -> pandas.DataFrame:
        """One row per job, metric and item, where a metric tells details: the error of every layer, say."""
        from nmbench.frames import details

        return details(self.records)

    def protocol(self) -> list[str]:
        """One line for every run: model, patterns, metrics, calibration, seeds, device and versions."""
        from nmbench.protocol import protocol_lines

        return protocol_lines(self)

    def table(self) -> pandas.DataFrame:
        """One row per job, every figure as text: what the terminal shows."""
        from nmbench.table import rows

        return rows(self.records)

    def summary(self) -> pandas.DataFrame:
        """One row per label and pattern, as text: every metric with its standard deviation over seeds, and the cost."""
        from nmbench.table import summary

        return summary(self)


def load_results(*directories: str | os.PathLike[str]) -> Results:
    """Read run directories; of several, each record says which it is from in `directory`.

    Raises `NMBenchError` if one holds no records.
    """
    paths = [Path(directory) for directory in directories]
    records: list[Record] = []
    for path in paths:
        if not (path / "records.jsonl").is_file():
            raise NMBenchError(f"{path} is not a run directory: it has no records.jsonl.")
        where = {"directory": str(path)} if len(paths) > 1 else {}
        records += [{**record, **where} for record in newest(read_records(path / "records.jsonl"))]
    return Results(records, paths)


def identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes a row the same row."""
    return record["label"], record.get("pattern"), record.get("seed")


def start_label(record: Mapping[str, Any]) -> str:
    """The label of the row that a learner started from; records made before that was told have `<label>@init`."""
    return str(record.get("started_from") or f"{record['label']}@init")


def newest(records: Sequence[Record]) -> list[Record]:
    """The last record of every row, rows in the order of their first record."""
    rows: dict[tuple[Any, ...], Record] = {}
    for record in records:
        rows[identity(record)] = record
    return list(rows.values())


def read_records(path: Path) -> list[Record]:
    """All whole lines of a records file; a torn last line, the mark of a kill, is left out."""
    records = []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = parsed(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise NMBenchError(f"{path} line {number} is not a JSON object; remove it to go on without its row.")
    return records


class RunDirectory:
    """One run on disk. Use as a context manager: it is locked while open, so two runs cannot mix."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records_path = path / "records.jsonl"
        self._lock = filelock.FileLock(path / ".lock")

    def __enter__(self) -> RunDirectory:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise NMBenchError(
                f"another nmbench run is writing to {self.path}; wait for it or give another --out."
            ) from None
        except OSError as error:
            raise cannot_write(self.path, error) from error
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def adopt(self, spec: RunSpec, manifest: Mapping[str, Any]) -> None:
        """Make this the directory of `spec`, or extend the run it holds. Raises `RunMismatch` with the difference."""
        spec_path = self.path / "spec.toml"
        if spec_path.exists():
            earlier = RunSpec.from_dict(read_toml(spec_path), str(spec_path))
            spec = merged(earlier, spec, self.path, {record["label"] for record in self.records()})
            manifest = self.joined_manifest(manifest)
        elif self.records_path.exists():
            raise RunMismatch(f"{self.path} has records but no spec.toml; give another --out.")
        self.repair()
        folder, file = shlex.quote(str(self.path)), shlex.quote(str(spec_path))
        again = (
            f"# Repeat or resume: nmbench run --config {file} --out {folder}\n"
            "# (every method of this directory at every pattern and seed, however many commands asked for them)\n"
            f"# Relative paths are seen from {Path.cwd()}\n"
        )
        write_atomic(spec_path, (again + tomli_w.dumps(spec.to_dict())).encode())
        write_atomic(self.path / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())

    def joined_manifest(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """`manifest` with what the earlier one says of other seeds.

        Raises `RunMismatch` if the same names now stand for other weights or other tokens.
        """
        path = self.path / "manifest.json"
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for name in ("model_digest", "test_digests"):
            if name in earlier and earlier[name] != manifest[name]:
                raise RunMismatch(f"{self.path} was made with other content: {name} differs; give another --out.")
        joined = dict(manifest)
        for name in ("calibration_digests", "pool_digests", "calibration_notes"):
            if name in manifest or name in earlier:
                joined[name] = {**manifest.get(name, {}), **earlier.get(name, {})}
        for name in ("calibration_digests", "pool_digests"):
            for seed, tokens in manifest.get(name, {}).items():
                if joined[name][seed] != tokens:
                    raise RunMismatch(
                        f"{self.path} was made with other content: the calibration tokens of seed {seed} differ; give "
                        f"another --out."
                    )
        return joined

    def repair(self) -> None:
        """Cut off a torn last line, so that the next record starts on a line of its own."""
        if not self.records_path.exists():
            return
        content = self.records_path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            tail = content[len(whole) :]
            complete = whole + tail + b"\n" if parsed(tail) else whole
            write_atomic(self.records_path, complete)

    def records(self) -> list[Record]:
        return newest(read_records(self.records_path))

    def append(self, record: Record) -> None:
        """Add a record; it is durable when this returns. Raises `CannotWrite` if the disk refuses."""
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        try:
            with self.records_path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(self.records_path, error) from error

    def finished(self, job_digest: str, job_name: str) -> Record | None:
        """The record of a job that ended well, if there is one and the files it speaks of are still there."""
        matching = (r for r in self.records() if r["job_digest"] == job_digest and r["status"] == "ok")
        record = next(matching, None)
        kinds = ("losses", "masks") if record and record["strict"] else ("losses",)
        return record if all(self.file(kind, job_name, ".safetensors").exists() for kind in kinds) else None

    def drop_checkpoint(self, job_name: str, record: Record) -> None:
        """Remove the checkpoint of a job that ended well."""
        if record["status"] == "ok":
            self.file("checkpoints", job_name, ".safetensors").unlink(missing_ok=True)

    def file(self, kind: str, job_name: str, suffix: str) -> Path:
        """Where a job keeps a file of a kind: masks, losses, checkpoints, errors."""
        return self.path / kind / f"{job_name}{suffix}"


def parsed(line: bytes) -> Record | None:
    """The record in a line, or None if it holds none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def merged(earlier: RunSpec, spec: RunSpec, where: Path, recorded: Collection[str]) -> RunSpec:
    """The union of two specs of one protocol; labels in `recorded` keep their options.

    Raises `RunMismatch` naming every difference that cannot be joined.
    """
    differences = list(differing(earlier.protocol(), spec.protocol()))
    if earlier.pattern_for != spec.pattern_for:
        differences.append(f"pattern_for was {dict(earlier.pattern_for)}, now {dict(spec.pattern_for)}")
    known = {method.label: method for method in earlier.methods}
    for method in spec.methods:
        before = known.setdefault(method.label, method)
        if method.label not in recorded:
            known[method.label] = method
        elif before.name != method.name or not same(before.options, method.options):
            differences.append(
                f"label {method.label!r} was {described(before)}, now {described(method)} (a label of its own, as "
                f"--method {method.label}2={method.name} --set {method.label}2.OPTION=VALUE, adds a row instead)"
            )
    if differences:
        raise RunMismatch(f"{where} holds another run: {'; '.join(differences)}. Give another --out.")
    return dataclasses.replace(
        spec,
        methods=tuple(known.values()),
        patterns=tuple(dict.fromkeys((*earlier.patterns, *spec.patterns))),
        seeds=tuple(dict.fromkeys((*earlier.seeds, *spec.seeds))),
        plugins=tuple(dict.fromkeys((*earlier.plugins, *spec.plugins))),
    )


def described(method: MethodSpec) -> str:
    """A method with its options, as people say it."""
    listed = ", ".join(f"{name}={value}" for name, value in method.options.items())
    return f"{method.name} with {listed or 'default options'}"


def same(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether options are the same, be they values or the text of them: 500 and "500", true and "yes"."""
    return before.keys() == now.keys() and all(alike(before[name], now[name]) for name in now)


def alike(before: Any, now: Any) -> bool:
    """Whether an option's value, perhaps as text, is that of another time."""
    if type(before) is type(now):
        return bool(before == now)
    kind = type(before) if isinstance(now, str) else type(now)
    try:
        return bool(read(before, kind) == read(now, kind))
    except ValueError:
        return False


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in now:
        if before.get(name) != now[name]:
            yield f"{name} was {before.get(name)!r}, now {now[name]!r}"
