"""Built-in plugins are listed, and commands that need no tensors answer, without heavy packages."""

from __future__ import annotations

from plugin_system.test_loading import fresh

BUILT_IN = """
import importlib.metadata
from nmbench import load_plugins
from nmbench.cli.methods import options_text

points = [p for p in importlib.metadata.entry_points(group="nmbench") if p.value.startswith("nmbench_plugins.")]
plugins = load_plugins(entry_points=points)
for info in plugins.failures:
    raise info.failure.error
for entry in plugins.registries.methods:
    print(options_text(entry.name, entry.obj))
"""
ANSWERS = (  # command, exit status, a part of the output
    (["methods"], 0, "swaps-judged"),
    (["plugins"], 0, "brings maskpro"),
    (["reproduce"], 0, "lines)"),
    (["new-plugin", "acme", "--kind", "learner"], 0, "nmbench-acme"),
    (["run", "--method", "wnda"], 1, "Did you mean 'wanda'?"),
    (["run", "--method", "ria", "--set", "ria.power=x"], 1, "option ria.power must be float"),
)
CALLS = """
import sys
from click.testing import CliRunner
from nmbench.cli import main

for command, status, part in ANSWERS:
    result = CliRunner().invoke(main, command)
    assert result.exit_code == status and part in result.output, (command, result.exit_code, result.output)
"""


def test_built_in_plugins_load_without_heavy_packages():
    """The modules that define the built-in methods, models, texts, metrics and reporters import no torch at their head.

    What computes is imported where it is used, so that a list of the methods takes no seconds. The traceback of a
    failure names the line to change.
    """
    done = fresh(BUILT_IN)
    assert done.returncode == 0, done.stderr
    assert "--set maskpro.prior=" in done.stdout and "--set reconstruct.scope=" in done.stdout


def test_commands_without_tensors_import_nothing_heavy(tmp_path, monkeypatch):
    """Commands that need no tensors, and refusals of misspelt methods and options, import no heavy package."""
    monkeypatch.chdir(tmp_path)
    done = fresh(f"ANSWERS = {ANSWERS!r}\n{CALLS}")
    assert done.returncode == 0, done.stderr
