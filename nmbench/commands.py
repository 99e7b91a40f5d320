"""The commands on files: validate, diff and export. Parsing and printing only; torch is imported when they run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nmbench.errors import NMBenchError

if TYPE_CHECKING:
    from nmbench.pattern import Pattern

NOT_STRICT, CANNOT_TELL = 1, 3


@click.command()
@click.argument("path")
@click.option("--pattern", metavar="N:M", help="Keep N of every M weights.  [what the file claims, or shows]")
@click.option("--skip", multiple=True, metavar="LAYERS", help="Layers that may be dense, as 'q_proj'; repeatable.")
@click.option("--like", metavar="PATH", help="A checkpoint of the same model: shapes of masks, layout.")
@click.option("--checksums", is_flag=True, help="Compare an export's files with the SHA-256 recorded for them, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def validate(
    path: str, pattern: str | None, skip: Sequence[str], like: str | None, checksums: bool, as_json: bool
) -> None:
    """Is this checkpoint, or mask file, strictly N:M? The first broken group is named.

    PATH is a folder of transformers, a safetensors, torch or .npz file, a folder of masks, or RUN_DIRECTORY:LABEL.
    Exit status: 0 strict, 1 not strict (or a file changed), 3 could not tell.
    """
    wanted = parsed(pattern)
    try:
        from nmbench.artifacts.checksums import changed_files
        from nmbench.artifacts.reading import open_artifact
        from nmbench.artifacts.text import validation_json, validation_text
        from nmbench.artifacts.validation import validate as judge

        artifact = open_artifact(path)
        found = judge(artifact, wanted, skip, open_artifact(like) if like else None)
        changed = changed_files(artifact) if checksums else []
    except NMBenchError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(CANNOT_TELL)
    content = {**validation_json(found), **({"changed_files": changed} if checksums else {})}
    click.echo(json.dumps(content, indent=2) if as_json else validation_text(found))
    if checksums and not as_json:
        click.echo(
            f"CHANGED since it was written: {', '.join(changed)}" if changed else "checksums as they were written"
        )
    sys.exit(0 if found.strict and not changed else NOT_STRICT)


def parsed(pattern: str | None) -> Pattern | None:
    """The pattern of a command whose exit status 1 says something else: an ill-formed one is wrong usage, 2."""
    from nmbench.pattern import Pattern

    try:
        return Pattern.parse(pattern) if pattern else None
    except NMBenchError as error:
        raise click.BadParameter(str(error), param_hint="--pattern") from error


@click.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option("--pattern", metavar="N:M", help="Count equal groups of M.  [what the files claim, or show]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def diff(first: str, second: str, pattern: str | None, as_json: bool) -> None:
    """How much do two masks have in common, by layer? Equal bits, equal groups, Jaccard index of the kept weights.

    A and B are what `nmbench validate` takes; of a checkpoint without masks, the non-zeros are compared.
    """
    from nmbench.artifacts.difference import compare
    from nmbench.artifacts.kept import kept_of
    from nmbench.artifacts.reading import open_artifact
    from nmbench.artifacts.text import difference_json, difference_text
    from nmbench.pattern import Pattern

    wanted = Pattern.parse(pattern) if pattern else None
    found = compare(kept_of(open_artifact(first)), kept_of(open_artifact(second)), wanted)
    click.echo(json.dumps(difference_json(found), indent=2) if as_json else difference_text(found))


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.argument("method")
@click.option("--to", "target", required=True, type=click.Path(path_type=Path), help="The folder to make.")
@click.option("--pattern", metavar="N:M", help="The pattern of the row, if the method has several.")
@click.option("--seed", type=click.IntRange(min=0), help="The seed of the row, if the method has several.")
@click.option("--device", metavar="auto|cpu|cuda", help="Where repaired weights are made again.  [that of the run]")
@click.option("--plugin", "plugin_files", multiple=True, metavar="FILE", help="Load a plugin from FILE.py.")
def export(
    run_dir: Path,
    method: str,
    target: Path,
    pattern: str | None,
    seed: int | None,
    device: str | None,
    plugin_files: Sequence[str],
) -> None:
    """Write a row of a run as a transformers folder: zeros in place, packed masks, a model card.

    METHOD is the label of the row. Weights that a method repaired are made again and must be the ones that were
    measured, bit by bit.
    """
    from nmbench.artifacts.again import find_row
    from nmbench.artifacts.text import sums, verdict
    from nmbench.pattern import Pattern
    from nmbench.plugins import load_plugins
    from nmbench.progress import ProgressPrinter

    row = find_row(run_dir, method, Pattern.parse(pattern) if pattern else None, seed)
    plugins = load_plugins(tuple(dict.fromkeys((*row.spec.plugins, *plugin_files))))
    plugins.add_observer(ProgressPrinter(), "progress")
    from nmbench.artifacts.export import export as write

    found = write(row, target, plugins, device)
    click.echo(f"{sums(found)}\n{verdict(found)}\nwrote {target}")
