"""`nmbench new-plugin`: write a package that passes its own tests."""

from __future__ import annotations

from pathlib import Path

import click

from nmbench.plugins.scaffold import KINDS, new_plugin


@click.command("new-plugin")
@click.argument("name")
@click.option("--kind", type=click.Choice(list(KINDS)), default="scorer", show_default=True)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=".", help="Folder to write to.  [this folder]"
)
def new_plugin_command(name: str, kind: str, out: Path) -> None:
    """Write a package with a method or metric NAME that builds, installs and passes its own tests."""
    from nmbench.plugins.loading import load_plugins

    registries = load_plugins().registries
    taken = (registries.metrics if KINDS[kind].registers == "metric" else registries.methods).entries.get(name)
    files = new_plugin(name, kind, out, taken.origin if taken else None)
    folder = out / f"nmbench-{name}"
    click.echo("\n".join(f"wrote {path}" for path in files))
    click.echo(f"\nNext: cd {folder} && pip install -e '.[test]' && pytest && {KINDS[kind].show.replace('NAME', name)}")
