"""The run directory: its lock, its specification and manifest, its records, and the files of its jobs.

`records.jsonl` is the truth: one line per finished job, appended and fsynced before observers receive the record. Every
other file can be made again from `records.jsonl`, or by the same command.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import tomli_w

from nmbench.errors import NMBenchError, RunMismatch
from nmbench.plain_data import read_toml
from nmbench.results.extending import filled, merged
from nmbench.results.files import cannot_write, notice, read_tensors, sync_folder, write_atomic
from nmbench.results.format import Record
from nmbench.results.records import newest, parsed, read_records
from nmbench.spec import RunSpec

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}")  # the name of a temporary file of `replacing`
LEFT = "left"  # the folder of records that wait to be appended


class RunDirectory:
    """One run on disk, as a context manager. The directory is locked while it is open, so that two runs cannot mix."""

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
        with contextlib.suppress(OSError):  # other processes have files there
            (self.path / LEFT).rmdir()
        self._lock.release()

    def adopt(self, spec: RunSpec, manifest: Mapping[str, Any]) -> None:
        """Write `spec` and `manifest`, joined with those of the run that the directory already holds.

        Raises `RunMismatch` with the difference if the two runs cannot be joined.
        """
        known = (self.path / "spec.toml").exists()
        spec = self.joined_spec(spec)
        manifest = self.joined_manifest(manifest) if known else manifest
        self.repair()
        self.sweep()
        self.write_spec(spec)
        write_atomic(self.path / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())

    def write_spec(self, spec: RunSpec) -> None:
        """Write `spec`, with the command that repeats the run."""
        spec_path = self.path / "spec.toml"
        folder, file = shlex.quote(str(self.path)), shlex.quote(str(spec_path))
        again = (
            f"# Repeat or resume: nmbench run --config {file} --out {folder}\n"
            "# (every method of this directory at every pattern and seed, however many commands asked for them)\n"
            f"# Relative paths are seen from {Path.cwd()}\n"
        )
        write_atomic(spec_path, (again + tomli_w.dumps(spec.to_dict())).encode())

    def spec(self) -> RunSpec | None:
        """Return the specification of the directory; None without one."""
        path = self.path / "spec.toml"
        return RunSpec.from_dict(read_toml(path), str(path)) if path.exists() else None

    def joined_spec(self, spec: RunSpec) -> RunSpec:
        """Return `spec` joined with that of the directory. Raises `RunMismatch` if they cannot be joined.

        A directory without a manifest has only been asked for its commands, so that defaults of its model are open.
        """
        earlier = self.spec()
        if earlier is not None:
            if not (self.path / "manifest.json").exists():
                earlier = filled(earlier, spec)
            return merged(earlier, spec, self.path, {record["label"] for record in self.records()})
        if self.records_path.exists():
            raise RunMismatch(f"{self.path} has records but no spec.toml; give another --out.")
        return spec

    def manifest(self) -> dict[str, Any]:
        """Return the manifest of the directory; nothing without one."""
        path = self.path / "manifest.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
        except ValueError as error:
            raise NMBenchError(f"{path} is not JSON ({error}); remove it: it is written anew.") from None

    def joined_manifest(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Return `manifest` with doubts, and digests and notes of further seeds, from the earlier manifest.

        Raises `RunMismatch` if weights or tokens of the same name have another digest than before.
        """
        earlier = self.manifest()
        for name in ("model_digest", "test_digests"):
            if name in earlier and earlier[name] != manifest[name]:
                raise RunMismatch(f"{self.path} was made with other content: {name} differs; give another --out.")
        joined = dict(manifest)
        for name in ("calibration_digests", "pool_digests", "calibration_notes", "sampled"):
            if name in manifest or name in earlier:
                joined[name] = {**manifest.get(name, {}), **earlier.get(name, {})}
        if "doubts" in manifest:
            joined["doubts"] = list(dict.fromkeys([*earlier.get("doubts", ()), *manifest["doubts"]]))
        for name in ("calibration_digests", "pool_digests"):
            for seed, tokens in manifest.get(name, {}).items():
                if joined[name][seed] != tokens:
                    raise RunMismatch(
                        f"{self.path} was made with other content: the calibration tokens of seed {seed} differ; give "
                        f"another --out."
                    )
        return joined

    def repair(self) -> None:
        """Remove a torn last line of `records.jsonl`, so that the next record starts on a new line."""
        if not self.records_path.exists():
            return
        content = self.records_path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            tail = content[len(whole) :]
            complete = whole + tail + b"\n" if parsed(tail) else whole
            write_atomic(self.records_path, complete)

    def records(self) -> list[Record]:
        """Return the newest record of every row, also of rows that processes of their own have left."""
        left = self._all_left()  # first: a record that is appended meanwhile is read below
        return newest([*read_records(self.records_path), *left])

    def _all_left(self) -> list[Record]:
        found: list[Record] = []
        names: list[str] = []
        with contextlib.suppress(FileNotFoundError):  # no other processes, as a rule
            names = sorted(os.listdir(self.path / LEFT))
        for name in (name for name in names if name.endswith(".json")):
            with contextlib.suppress(FileNotFoundError):  # appended by the run, and removed
                found += read_records(self.path / LEFT / name)
        return found

    def leave(self, record: Record, job_name: str) -> None:
        """Leave the record of a job that a process of its own did, for the process that holds the lock to append."""
        write_atomic(self.file(LEFT, job_name, ".json"), (json.dumps(record, allow_nan=False) + "\n").encode())

    def left(self, job_name: str, job_digest: str) -> Record | None:
        """Return the record that was left for a job, None if there is none of this digest."""
        found = read_records(self.file(LEFT, job_name, ".json"))
        return found[0] if found and found[0]["job_digest"] == job_digest else None

    @contextlib.contextmanager
    def working_on(self, job_name: str, patient: bool = False) -> Iterator[None]:
        """Hold the lock of one job; `patient`: wait for it. Raises `NMBenchError` if another process does this job."""
        path = self.file(LEFT, job_name, ".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(path, timeout=-1 if patient else 0):
                yield
        except filelock.Timeout:
            raise NMBenchError(f"another process does {job_name} of {self.path}; wait for it.") from None
        with contextlib.suppress(OSError):  # held by a process that waited for it
            path.unlink(missing_ok=True)

    def append(self, record: Record) -> None:
        """Add a record; it is durable when this returns. Raises `CannotWrite` if the disk refuses."""
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        new = not self.records_path.exists()
        try:
            with self.records_path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            if new:
                sync_folder(self.path)
        except OSError as error:
            raise cannot_write(self.records_path, error) from error

    def finished(self, job_digest: str, job_name: str) -> Record | None:
        """Return the record of a job that ended well and whose masks and losses are whole, else None.

        A notice names a damaged file.
        """
        record = self.recorded(job_digest, job_name)
        files = [self.file(kind, job_name, ".safetensors") for kind in ("losses", "masks", "weights")]
        return record if record and all(sound(path) for path in files if path.exists()) else None

    def recorded(self, job_digest: str, job_name: str) -> Record | None:
        """Return the record of a job that ended well and whose masks and losses are on disk, whole or not, else None.

        Weights may be gone: they are made again for an export.
        """
        matching = (r for r in self.records() if r["job_digest"] == job_digest and r["status"] == "ok")
        record = next(matching, None)
        kinds = ("losses", "masks") if record and record["strict"] else ("losses",)
        return record if all(self.file(kind, job_name, ".safetensors").exists() for kind in kinds) else None

    def sweep(self) -> None:
        """Remove the temporary files that killed writes left, unless processes of their own may be at work."""
        if any(held(path) for path in (self.path / LEFT).glob("*.lock")):
            return
        for path in (*self.path.glob(".*"), *self.path.glob("*/.*")):
            if TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def drop_left(self, job_name: str) -> None:
        """Remove the record that was left for a job, because it is appended."""
        self.file(LEFT, job_name, ".json").unlink(missing_ok=True)

    def drop_checkpoint(self, job_name: str, record: Record) -> None:
        """Remove the checkpoints of a job that ended well, of its blocks as well."""
        if record["status"] == "ok":
            self.file("checkpoints", job_name, ".safetensors").unlink(missing_ok=True)
            for block in self.file("checkpoints", job_name, "").parent.glob(f"{job_name}.block*.safetensors"):
                block.unlink()

    def file(self, kind: str, job_name: str, suffix: str) -> Path:
        """Return the path of a file of a job; `kind` is masks, weights, losses, checkpoints, sampled or errors."""
        return self.path / kind / f"{job_name}{suffix}"


def held(path: Path) -> bool:
    """Return True if a process holds the lock `path`."""
    try:
        with filelock.FileLock(path, timeout=0):
            return False
    except filelock.Timeout:
        return True


def sound(path: Path) -> bool:
    """Return True if a file of tensors is whole; a notice says that its row is made again otherwise."""
    try:
        read_tensors(path)
    except NMBenchError as error:
        notice(f"{error} Its row is made again now.")
        return False
    return True
