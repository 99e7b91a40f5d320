"""`nmbench export`: a row as a folder that transformers loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.argument("method")
@click.option("--to", "target", required=True, type=click.Path(path_type=Path), help="The folder to make.")
@click.option("--pattern", metavar="N:M", help="The pattern of the row, if the method has several.")
@click.option("--seed", type=click.IntRange(min=0), help="The seed of the row, if the method has several.")
@click.option("--device", metavar="auto|cpu|cuda", help="Device to repair weights on again.  [that of the run]")
@click.option("--dtype", metavar="NAME", help="Dtype of the weights written.  [that of the checkpoint]")
@click.option("--plugin", "plugin_files", multiple=True, metavar="FILE", help="Load a plugin from FILE.py.")
def export(
    run_dir: Path,
    method: str,
    target: Path,
    pattern: str | None,
    seed: int | None,
    device: str | None,
    dtype: str | None,
    plugin_files: Sequence[str],
) -> None:
    """Write a row of a run as a transformers folder: zeros in place, packed masks, a model card.

    METHOD is the label of the row. Repaired weights are computed again and must equal the measured ones, bit by bit.
    """
    from nmbench.artifacts.rebuilding import find_row
    from nmbench.artifacts.rendering import sums, verdict
    from nmbench.experiment.progress import ProgressPrinter
    from nmbench.pattern import Pattern
    from nmbench.plugins.loading import load_plugins

    row = find_row(run_dir, method, Pattern.parse(pattern) if pattern else None, seed)
    plugins = load_plugins(tuple(dict.fromkeys((*row.spec.plugins, *plugin_files))))
    plugins.add_observer(ProgressPrinter(), "progress")
    from nmbench.artifacts.export import export as write

    written = write(row, target, plugins, device, dtype=dtype)
    if written.rounded:
        click.echo(f"WARNING {written.rounded}", err=True)
    click.echo(f"{sums(written.validation)}\n{verdict(written.validation)}\nwrote {target}")
