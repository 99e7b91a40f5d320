"""What the README says is run: its commands are understood, its plugin works, its files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [block.replace("\\\n", " ") for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)]
SHELL = [line for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line.partition("#")[0].strip() for line in SHELL if line.startswith("nmbench ")]
RUNS = [command for command in COMMANDS if command.startswith("nmbench run")]
FILES = ("nmbench export", "nmbench validate", "nmbench diff")  # commands on what a run has left
MAIN = next(line for line in SHELL if "nmbench run" in line and "pip install" in line)
PLUGIN = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "mine.py" in block)


def test_there_are_commands_to_test():
    """The patterns above find what they should."""
    assert len(RUNS) >= 8
    assert len(COMMANDS) >= 11


@pytest.mark.parametrize("command", RUNS)
def test_every_run_is_understood(command, nmbench, tmp_path, monkeypatch):
    """Every `nmbench run` of the README names methods, options, models, texts and metrics that exist."""
    from nmbench.errors import NMBenchError

    (tmp_path / "mine.py").write_text(PLUGIN)
    for name in ("notes.txt", "novel.txt", "documents.jsonl", "model.gguf", "masks.npz"):
        (tmp_path / name).write_text("")
    (tmp_path / "my-model").mkdir()
    reached = []

    def stop(spec, plugins, methods):
        reached.append(spec)
        raise NMBenchError("far enough")

    monkeypatch.setattr("nmbench.run.load_model", stop)  # names and options have been looked up by then
    result = nmbench_run(nmbench, command)
    assert result.stderr == "Error: far enough\n"
    assert reached[0].methods


def nmbench_run(call, command):
    return call(*shlex.split(command)[1:])


def test_the_commands_can_follow_each_other(nmbench, tmp_path, monkeypatch):
    """In the order of the README no command on the demo clashes with what an earlier one left in its run directory."""
    from nmbench.errors import NMBenchError
    from nmbench.results.extending import merged

    (tmp_path / "mine.py").write_text(PLUGIN)
    (tmp_path / "masks.npz").write_text("")
    specs = []

    def stop(spec, plugins, methods):
        specs.append(spec)
        raise NMBenchError("far enough")

    monkeypatch.setattr("nmbench.run.load_model", stop)
    for command in [MAIN.split("&&")[-1].strip().removeprefix(".venv/bin/"), *RUNS]:
        if "--model" not in command:
            nmbench_run(nmbench, command)
    directories = {}
    for spec in specs:
        shared = (spec.protocol_digest, spec.pattern_for)  # what the default run directory is named by
        earlier = directories.get(shared, spec)
        labels = {method.label for method in earlier.methods}
        directories[shared] = merged(earlier, spec, tmp_path, labels)
    assert len(specs) >= 7
    assert len(directories) < len(specs)


def test_results_are_taken_along(nmbench, small):
    """The commands on a finished run, in the order of the README, all succeed on such a run."""
    commands = [shlex.split(command)[1:] for command in COMMANDS if command.startswith(FILES)]
    assert [arguments[0] for arguments in commands] == ["export", "validate", "diff"]
    assert nmbench("run", *small, "--method", "wanda", "--out", commands[0][1]).exit_code == 0
    for arguments in commands:
        result = nmbench(*arguments)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(("nmbench run", *FILES))])
def test_every_listing_works(command, nmbench):
    """`nmbench methods`, `nmbench methods maskpro` and `nmbench plugins` print something and exit with 0."""
    result = nmbench_run(nmbench, command)
    assert result.exit_code == 0
    assert result.output


def test_the_plugin_of_the_readme_runs(nmbench, small, records, tmp_path):
    """The method in the README, with its option, gives a strict row; with exponent 1 it is Wanda."""
    (tmp_path / "mine.py").write_text(PLUGIN)
    flags = ["--plugin", "mine.py", "--method", "squared", "--method", "wanda", "--set", "squared.power=1"]
    result = nmbench("run", *small, *flags)
    assert result.exit_code == 0, result.output
    rows = {row["label"]: row for row in records(tmp_path / "out")}
    assert rows["squared"]["proof"]["masks_digest"] == rows["wanda"]["proof"]["masks_digest"]


def test_the_paths_named_exist():
    """Every file of the repository that the README links to or names is there."""
    linked = re.findall(r"\]\((?!http)([^)]+)\)", README)
    named = re.findall(r"`((?:nmbench|benchmarks|tests|\.ci)/[\w./]+|constraints\.txt|NOTICE)`", README)
    assert linked
    assert named
    assert [path for path in (*linked, *named) if not (ROOT / path).exists()] == []


@pytest.mark.slow
def test_the_main_command(nmbench, records, tmp_path):
    """The command that the README begins with, as it stands: MaskPro ends below Wanda, where it starts."""
    command = MAIN.split("&&")[-1].strip().removeprefix(".venv/bin/")
    result = nmbench_run(nmbench, command)
    assert result.exit_code == 0, result.output
    (directory,) = (tmp_path / "runs").iterdir()
    value = {row["label"]: next(iter(row["metrics"].values()))["value"] for row in records(directory)}
    assert value["dense"] < value["maskpro"] < value["maskpro@init"] == value["wanda"]
