"""`nmbench export`: a row as a folder that transformers loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from nmbench.cli.shared import progress_shown
from nmbench.errors import NMBenchError

ENGINES = "What the folder is for: plain, packed, vllm-0.18, slidesparse or torchao.  [plain]"


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.argument("method", required=False)
@click.option("--to", "target", required=True, type=click.Path(path_type=Path), help="The folder to make.")
@click.option("--pattern", metavar="N:M", help="The pattern of the row, if the method has several.")
@click.option("--seed", type=click.IntRange(min=0), help="The seed of the row, if the method has several.")
@click.option("--device", metavar="auto|cpu|cuda", help="Device to repair weights on again.  [that of the run]")
@click.option("--dtype", metavar="NAME", help="Dtype of the weights written.  [that of the checkpoint]")
@click.option("--for", "engine", default="plain", metavar="ENGINE", help=ENGINES)
@click.option("--exact", is_flag=True, help="Fill groups with fewer than N non-zeros.")
@click.option("--plugin", "plugin_files", multiple=True, metavar="FILE", help="Load a plugin from FILE.py.")
def export(
    run_dir: Path,
    method: str | None,
    target: Path,
    pattern: str | None,
    seed: int | None,
    device: str | None,
    dtype: str | None,
    engine: str,
    exact: bool,
    plugin_files: Sequence[str],
) -> None:
    """Write a row of a run as a transformers folder: zeros in place, packed masks, a model card.

    METHOD is the label of the row; RUN_DIR:LABEL[:N:M[:SEED]] names the row without it. Repaired weights are computed
    again and must equal the measured ones, bit by bit.
    """
    from nmbench.artifacts.rebuilding import find_row
    from nmbench.artifacts.rendering import fullness, sums, verdict
    from nmbench.pattern import Pattern
    from nmbench.plugins.loading import load_plugins
    from nmbench.results.address import FORM, Address, address_or_directory

    address = address_or_directory(run_dir) if method is None else Address(run_dir, method)
    if address.label is None:
        raise NMBenchError(f"{run_dir} names no row; give {FORM}, or a label after the run directory.")
    pattern = pattern or address.pattern
    wanted = Pattern.parse(pattern) if pattern else None
    row = find_row(address.directory, address.label, wanted, address.seed if seed is None else seed)
    plugins = load_plugins(tuple(dict.fromkeys((*row.spec.plugins, *plugin_files))))
    from nmbench.artifacts.export import export as write
    from nmbench.artifacts.targets import target_named

    form = target_named(engine)
    with progress_shown(plugins):
        written = write(row, target, plugins, device, dtype=dtype, engine=engine, exact=exact)
    for warning in filter(None, (written.rounded, form.warning)):
        click.echo(f"WARNING {warning}", err=True)
    click.echo(f"{sums(written.validation)}\n{fullness(written.validation)}\n{verdict(written.validation)}")
    if written.exact:
        click.echo(written.exact)
    if written.packed_bytes:
        packed, dense = written.packed_bytes
        click.echo(f"packed layers: {packed} bytes, {packed / dense:.1%} of {dense} bytes as dense ones")
    click.echo(f"wrote {target}")
