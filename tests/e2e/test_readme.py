"""The README is executed: its plugin works, its files exist, its first command prints the table shown.

Its other commands are looked up with those of all pages, in `test_docs.py`.
"""

from __future__ import annotations

import re
import shlex

import pytest

from pages import LINK, ROOT, commands, program, text_of

README = text_of("README.md")
MAIN = next(line for line in README.splitlines() if "nmbench run" in line and "pip install" in line)


def test_it_is_a_front_page():
    """The README has fewer than 130 lines; the rest is in `docs/`."""
    assert len(README.splitlines()) < 130
    assert len(commands("README.md")) >= 7


def test_the_plugin_of_the_readme_runs(nmbench, small, records, tmp_path):
    """The method in the README, with its option, gives a strict row; with exponent 1 it is Wanda."""
    (tmp_path / "mine.py").write_text(program("README.md", "mine.py"))
    flags = ["--plugin", "mine.py", "--method", "squared", "--method", "wanda", "--set", "squared.power=1"]
    result = nmbench("run", *small, *flags)
    assert result.exit_code == 0, result.output
    rows = {row["label"]: row for row in records(tmp_path / "out")}
    assert rows["squared"]["proof"]["masks_digest"] == rows["wanda"]["proof"]["masks_digest"]


def test_the_paths_named_exist():
    """Every file of the repository that the README links to or names is there."""
    linked = LINK.findall(README)
    named = re.findall(r"`((?:nmbench|benchmarks|tests|\.ci)/[\w./]+|constraints\.txt|NOTICE)`", README)
    assert linked
    assert named
    assert [path for path in (*linked, *named) if not (ROOT / path).exists()] == []


@pytest.mark.slow
def test_the_main_command(nmbench, records, tmp_path):
    """The command that the README begins with, as it stands: MaskPro ends below Wanda, where it starts."""
    result = nmbench(*shlex.split(MAIN.split("&&")[-1])[1:])
    assert result.exit_code == 0, result.output
    (directory,) = (tmp_path / "runs").iterdir()
    value = {row["label"]: next(iter(row["metrics"].values()))["value"] for row in records(directory)}
    assert value["dense"] < value["maskpro"] < value["maskpro@init"] == value["wanda"]
