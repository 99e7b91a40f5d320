"""`nmbench run --dry-run`: what the command would do, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nmbench.cli.shared import loaded

if TYPE_CHECKING:
    from nmbench.experiment.forecast import Forecast
    from nmbench.experiment.whereabouts import Whereabouts
    from nmbench.spec import RunSpec

GIBIBYTE = 2**30
UNKNOWN = "-"


def dry_run(spec: RunSpec, out: Path | None) -> None:
    """Print every row of a run, whether it is done, and what it will take by the records of `out`; load no weights."""
    from nmbench.experiment.contenders import with_typed_options
    from nmbench.experiment.forecast import forecasts, where

    plugins = loaded(spec.plugins)
    spec = with_typed_options(spec, plugins)
    rows = forecasts(spec, plugins, out)
    width = max(len(row.title) for row in rows)
    click.echo(f"{'row':<{width}}  state    seconds  host GiB  device GiB")
    for row in rows:
        click.echo(line(row, width))
    click.echo(f"\n{summary(rows)}")
    click.echo("\n".join(places(where(spec, plugins))))
    if out is None:
        click.echo("The run directory follows from the weights; give --out to see what is done.")


def places(found: Whereabouts | None) -> list[str]:
    """Return the lines on what will lie where."""
    if found is None:
        return ["What will lie on the device, in host memory and on disk is known when the model is loaded."]
    how = f"blocks come from {'memory' if found.source == 'host' else 'disk'} one by one" if found.source else ""
    return [f"Estimated, {how or 'the whole model on the device'}:", *(f"  {text}" for text in found.lines())]


def line(row: Forecast, width: int) -> str:
    """Return one line of the table."""
    seconds = UNKNOWN if row.seconds is None else f"{row.seconds:.1f}"
    host, device = (UNKNOWN if it is None else f"{it / GIBIBYTE:.1f}" for it in (row.host_bytes, row.device_bytes))
    return f"{row.title:<{width}}  {'done' if row.done else 'to do':<5}  {seconds:>9}  {host:>8}  {device:>10}"


def summary(rows: Sequence[Forecast]) -> str:
    """Return the number of rows that are not done, and how long they will take as far as that is known."""
    from nmbench.experiment.progress import duration

    left = [row for row in rows if not row.done]
    known = [row.seconds for row in left if row.seconds is not None]
    if not left:
        return f"All {len(rows)} rows are done."
    time = f"about {duration(sum(known))}" if known else "time not known"
    missing = f" and {len(left) - len(known)} of unknown time" if known and len(known) < len(left) else ""
    return f"{len(left)} of {len(rows)} rows are to do: {time}{missing}."
