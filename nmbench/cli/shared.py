"""What several commands share: the plugin option, the width of the terminal, report files."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from nmbench.plugins.loading import Plugins


plugin_option = click.option(
    "--plugin", "plugin_files", multiple=True, metavar="FILE", help="Load a plugin from FILE.py."
)


def terminal_width() -> int | None:
    """How many columns the terminal has; None where the output goes elsewhere, and nothing may be left out of it."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def tell_broken_files(plugins: Plugins) -> None:
    """A plugin that fails stops nobody; but whoever named its file should know at once."""
    for line in plugins.broken_files:
        click.echo(f"WARNING {line}", err=True)


def write_reports(plugins: Plugins, results: Any, directory: Path, formats: Sequence[str]) -> list[Path]:
    """Write the reports named."""
    reporters = [
        plugins.lookup(plugins.registries.reporters, name) for name in formats
    ]  # all are there, or none writes
    directory.mkdir(parents=True, exist_ok=True)
    return [reporter().write(results, directory) for reporter in reporters]
