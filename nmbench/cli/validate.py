"""`nmbench validate`: prove that a checkpoint or a mask file is strictly N:M."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from nmbench.errors import NMBenchError

if TYPE_CHECKING:
    from nmbench.pattern import Pattern


EXIT_NOT_STRICT, EXIT_NOT_JUDGED = 1, 3


@click.command()
@click.argument("path")
@click.option(
    "--pattern", metavar="N:M", help="Keep N of every M weights, or N:MxU: units.  [claimed by the file, or inferred]"
)
@click.option("--skip", multiple=True, metavar="LAYERS", help="Layers that may be dense, as 'q_proj'; repeatable.")
@click.option("--like", metavar="PATH", help="A checkpoint of the same model: shapes of masks, layout.")
@click.option("--checksums", is_flag=True, help="Compare an export's files with the SHA-256 recorded for them, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def validate(
    path: str, pattern: str | None, skip: Sequence[str], like: str | None, checksums: bool, as_json: bool
) -> None:
    """Check that a checkpoint or mask file is strictly N:M, and name the first broken group.

    PATH is a transformers folder, a safetensors, torch or .npz file, a folder of masks, or a row, as
    RUN_DIRECTORY:LABEL[:N:M[:SEED]]. Exit status: 0 strict, 1 not strict (or a file changed), 3 not judged.
    """
    wanted = parsed_pattern(pattern)
    try:
        from nmbench.artifacts.checksums import changed_files
        from nmbench.artifacts.reading import open_artifact
        from nmbench.artifacts.rendering import validation_json, validation_text
        from nmbench.artifacts.validation import validate as judge

        artifact = open_artifact(path)
        found = judge(artifact, wanted, skip, open_artifact(like) if like else None)
        changed = changed_files(artifact) if checksums else []
    except NMBenchError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(EXIT_NOT_JUDGED)
    content = {**validation_json(found), **({"changed_files": changed} if checksums else {})}
    click.echo(json.dumps(content, indent=2) if as_json else validation_text(found))
    if checksums and not as_json:
        click.echo(
            f"CHANGED since it was written: {', '.join(changed)}" if changed else "checksums as they were written"
        )
    sys.exit(0 if found.strict and not changed else EXIT_NOT_STRICT)


def parsed_pattern(pattern: str | None) -> Pattern | None:
    """The pattern of the flag. An ill-formed one is a usage error, exit status 2, since 1 stands for "not strict"."""
    from nmbench.pattern import Pattern

    try:
        return Pattern.parse(pattern) if pattern else None
    except NMBenchError as error:
        raise click.BadParameter(str(error), param_hint="--pattern") from error
