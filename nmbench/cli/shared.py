"""Code that several commands share: the plugin option, the width of the terminal, report files."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nmbench.errors import NMBenchError

if TYPE_CHECKING:
    from nmbench.plugins.loading import Plugins


plugin_option = click.option(
    "--plugin", "plugin_files", multiple=True, metavar="FILE", help="Load a plugin from FILE.py."
)


def terminal_width() -> int | None:
    """The number of columns of the terminal; None for a file or pipe, where the table is printed in full."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def check_plugin_files(plugins: Plugins) -> None:
    """Warn of installed plugins that a plugin file replaces. Raises `NMBenchError` for a file that failed to load."""
    for line in plugins.broken_files:
        raise NMBenchError(f"{line}; mend the file, or leave out --plugin.")
    for line in plugins.replaced:
        click.echo(f"WARNING {line}", err=True)


def write_reports(plugins: Plugins, results: Any, directory: Path, formats: Sequence[str]) -> list[Path]:
    """Write a report in each of `formats`; return the paths. An unknown format raises before any report is written."""
    reporters = [plugins.lookup(plugins.registries.reporters, name) for name in formats]
    directory.mkdir(parents=True, exist_ok=True)
    return [reporter().write(results, directory) for reporter in reporters]
