"""`nmbench work`: one job of a run directory, for a scheduler."""

from __future__ import annotations

from pathlib import Path

import click

from nmbench.cli.shared import loaded, observed


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("job")
@click.option("--quiet", is_flag=True, help="No progress.")
def work(directory: Path, job: str, quiet: bool) -> None:
    """Do one job of a run directory, by its name; `nmbench run --jobs script` prints the names.

    The job `dense` comes first. `nmbench run --config DIR/spec.toml --out DIR` makes the table of what is done.
    """
    from nmbench.plain_data import read_toml
    from nmbench.spec import DENSE, RunSpec

    path = directory / "spec.toml"
    spec = RunSpec.from_dict(read_toml(path), str(path))
    if job == DENSE:
        from nmbench.run import run_dense

        plugins = loaded(spec.plugins)
        with observed(plugins, quiet):
            run_dense(spec, directory, plugins)
    else:
        from nmbench.workers.task import Task, do

        do(Task(spec, directory.absolute(), job, quiet, patient=False))
