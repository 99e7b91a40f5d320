"""What a command would do, before a model is loaded: its jobs, which are done, and what they will take.

Seconds and memory are those of rows of the same run directory: of the same label and pattern at other seeds, else of
the same method with the same options at other patterns.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmbench.errors import RunMismatch
from nmbench.experiment.jobs import Job, dense_digest, jobs
from nmbench.experiment.loading import device_of, outlined, streamed_from
from nmbench.experiment.plan import checked
from nmbench.experiment.whereabouts import Whereabouts, whereabouts
from nmbench.plugins.loading import Plugins
from nmbench.results.directory import RunDirectory
from nmbench.results.extending import differing
from nmbench.results.format import Record
from nmbench.spec import DENSE, Defaults, RunSpec

FOLLOWS = "*"  # a protocol that no run has: nothing is done


@dataclass(frozen=True)
class Forecast:
    """One row of a run: whether it is done, and what it took, or will take; None: not known."""

    label: str
    title: str
    done: bool
    seconds: float | None
    host_bytes: int | None
    device_bytes: int | None


def forecasts(spec: RunSpec, plugins: Plugins, out: Path | None) -> list[Forecast]:
    """Return one forecast for every row of `spec` in their order; no weights are loaded.

    Without a run in `out`, no row is done, and patterns are those of the general defaults where the command leaves
    them open. Raises `NMBenchError` as the run would for unknown names and bad values, and `RunMismatch` for a setting
    that the run in `out` does not have.
    """
    plan = checked(spec, plugins)
    directory = RunDirectory(out) if out else None
    protocol = known_protocol(plan.spec, directory)
    return forecasts_of(jobs(plan.spec.resolved(Defaults()), plan.contenders, protocol), protocol, directory)


def where(spec: RunSpec, plugins: Plugins) -> Whereabouts | None:
    """Return what of the run of `spec` will lie where; None if only a loaded model tells.

    Raises `NMBenchError` for a model that cannot be streamed as it is asked for.
    """
    plan, bundle = checked(spec, plugins), outlined(spec, plugins)
    if bundle is None:
        return None
    resolved, device = plan.resolved(bundle.defaults), device_of(spec.device)
    return whereabouts(bundle, resolved, plan.methods, device, streamed_from(bundle, resolved, plan.methods, device))


def forecasts_of(found: Iterable[Job], protocol: str, directory: RunDirectory | None) -> list[Forecast]:
    """Return the forecasts of the dense row and of the jobs `found`; `protocol`: the protocol digest."""
    records = directory.records() if directory else []
    dense = recorded(directory, dense_digest(protocol), DENSE)
    rows = [forecast(DENSE, DENSE, dense, [record for record in records if record["label"] == DENSE])]
    for job in found:
        known = recorded(directory, job.digest, job.name)
        rows.append(forecast(job.label, job.title, known, alike(job, records)))
    return rows


def known_protocol(spec: RunSpec, directory: RunDirectory | None) -> str:
    """Return the protocol digest of the run in `directory`, which covers its weights and texts, else `FOLLOWS`."""
    earlier, manifest = (directory.spec(), directory.manifest()) if directory else (None, {})
    if directory is None or earlier is None or not manifest:
        return FOLLOWS
    asked = {name: value for name, value in spec.protocol().items() if value not in (None, [])}
    if found := list(differing(earlier.protocol(), asked)):
        raise RunMismatch(f"{directory.path} holds another run: {'; '.join(found)}. Give another --out.")
    return str(manifest["protocol_digest"])


def recorded(directory: RunDirectory | None, digest: str, name: str) -> Record | None:
    """Return the record of a row that is done, by its digest and its files; the files are not read."""
    return directory.recorded(digest, name) if directory else None


def alike(job: Job, records: Sequence[Record]) -> list[Record]:
    """Return the records that a job is estimated by: its label and pattern, else its method and options."""
    ended = [record for record in records if record["status"] == "ok" and record["label"] != DENSE]
    near = [one for one in ended if (one["label"], one["pattern"]) == (job.label, str(job.pattern))]
    options = dict(job.contender.options)
    return near or [one for one in ended if one["method"] == job.contender.name and dict(one["options"]) == options]


def forecast(label: str, title: str, record: Record | None, others: Sequence[Record]) -> Forecast:
    """Return the forecast of one row: by its own record if it is done, else by those of `others`."""
    known = [record] if record else others
    host, device = (figures(known, "peak_bytes", name) for name in ("host", "device"))
    seconds = figures(known, "seconds", "total")
    mean = statistics.fmean(seconds) if seconds else None
    return Forecast(label, title, record is not None, mean, max(host, default=None), max(device, default=None))


def figures(records: Sequence[Record], table: str, name: str) -> list[Any]:
    """Return a figure of every record that has it."""
    tables: Iterator[Any] = (dict(record)[table] for record in records)
    return [found[name] for found in tables if found.get(name) is not None]
