"""The jobs of a run as commands, for a scheduler that nmbench does not know."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from nmbench.experiment.jobs import jobs
from nmbench.experiment.plan import checked
from nmbench.plugins.loading import Plugins
from nmbench.results.directory import RunDirectory
from nmbench.results.extending import filled
from nmbench.spec import DENSE, Defaults, RunSpec
from nmbench.workers.schedule import needs


def commands_of(spec: RunSpec, out: Path, plugins: Plugins) -> list[str]:
    """Write `spec` to the directory `out`, and return the commands of its jobs in stages. Nothing is loaded.

    Commands of one stage may run at the same time. Raises `NMBenchError` for unknown names and bad values.
    """
    plan = checked(spec, plugins)
    found = list(jobs(plan.resolved(Defaults()), plan.contenders, protocol=""))
    with RunDirectory(out) as directory:
        directory.write_spec(directory.joined_spec(filled(spec, directory.spec() or spec)))
    lines = ["# first", command(out, DENSE)]
    for stage in stages(needs(found)):
        lines += ["# then, at the same time", *(command(out, name) for name in stage)]
    folder = shlex.quote(str(out))
    again = f"nmbench run --config {shlex.quote(str(out / 'spec.toml'))} --out {folder}"
    return [*lines, "# at the end, for the table", again]


def command(out: Path, name: str) -> str:
    """Return the command of one job."""
    return f"nmbench work {shlex.quote(str(out))} {shlex.quote(name)}"


def stages(wanted: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the names in stages: those of a stage want only names of earlier stages. `wanted`: name -> its needs."""
    found: list[list[str]] = []
    done: set[str] = set()
    while len(done) < len(wanted):
        found.append([name for name, needs in wanted.items() if name not in done and needs <= done])
        done |= set(found[-1])
    return found
