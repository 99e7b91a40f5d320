"""`nmbench new-plugin`: the package builds, installs, passes its own tests and takes part in a comparison."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nmbench.errors import NMBenchError
from nmbench.scaffold import KINDS, check_name, new_plugin
from nmbench.spec import read_toml

NAMES = {"scorer": "acme", "solver": "acme-2", "learner": "my-own-method"}
FILES = ["pyproject.toml", "README.md", "tox.ini", ".github/workflows/tests.yml", ".gitignore"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a fresh package of every kind."""
    folder = tmp_path_factory.mktemp("new")
    for kind, name in NAMES.items():
        new_plugin(name, kind, folder)
    return folder


@pytest.fixture(scope="module")
def environment(folder):
    """An environment in which all of them are built and installed; nothing is downloaded."""
    site = folder / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    packages = [str(folder / f"nmbench-{name}") for name in NAMES.values()]
    check(subprocess.run([*command, "--target", str(site), *packages], capture_output=True, text=True, check=False))
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def check(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def call(environment, cwd, *args):
    return check(
        subprocess.run(
            [sys.executable, "-m", *args], cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )
    )


def test_every_kind_is_tried_here():
    """No kind of package is without a test."""
    assert set(NAMES) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written(folder, kind):
    """A package has its module, three lines of tests, a project file with the entry point, and nothing left to fill."""
    name = NAMES[kind]
    root = folder / f"nmbench-{name}"
    module = f"nmbench_{name.replace('-', '_')}"
    assert all((root / file).is_file() for file in FILES)
    project = read_toml(root / "pyproject.toml")["project"]
    assert project["name"] == f"nmbench-{name}"
    assert project["entry-points"] == {"nmbench": {name: module}}
    lines = [line for line in (root / "tests/test_conformance.py").read_text().splitlines() if line]
    assert len(lines) == 3
    assert f'register("{name}", ' in (root / "src" / module / "__init__.py").read_text()
    everything = "".join(path.read_text() for path in root.rglob("*") if path.is_file())
    assert "%{" not in everything
    assert "nmbench_nmbench" not in everything


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_passes_its_own_tests(folder, environment, kind):
    """As installed, away from its sources, it passes every law."""
    root = folder / f"nmbench-{NAMES[kind]}"
    report = call(environment, root, "pytest", "-q", "-p", "no:cacheprovider")
    assert re.search(r"^\d\d passed in", report, re.MULTILINE), report


def test_new_methods_in_a_comparison(folder, environment, small, tmp_path):
    """The installed methods are listed with their package, and compared with a built-in one."""
    listed = call(environment, tmp_path, "nmbench.cli", "plugins")
    for name in NAMES.values():
        assert re.search(rf"^nmbench-{name} 0\.1\.0 \[{name}\]: .*nmbench_register", listed, re.MULTILINE), listed
    flags = [*small[: small.index("--set")], "--out", "out", "--quiet", "--method", "wanda"]
    methods = [flag for name in NAMES.values() for flag in ("--method", name)]
    steps = ["--set", f"{NAMES['learner']}.steps=3"]
    call(environment, tmp_path, "nmbench.cli", "run", *flags, *methods, *steps)
    rows = [json.loads(line) for line in (tmp_path / "out/records.jsonl").read_text().splitlines()]
    compared = {row["label"]: row for row in rows if row["label"] != "dense"}
    assert set(compared) == {"wanda", f"{NAMES['learner']}@init", *NAMES.values()}
    assert all(row["status"] == "ok" and row["strict"] for row in compared.values())
    assert [row["label"] for row in rows if row["weights_changed"]] == [NAMES["solver"]]


# What is refused


def contents(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("there", ["folder", "file", "broken link"])
def test_nothing_is_overwritten(nmbench, tmp_path, there):
    """Where there is something of that name already, it stays as it is, and the message says so."""
    target = tmp_path / "nmbench-acme"
    if there == "folder":
        target.mkdir()
        (target / "README.md").write_text("precious")
    elif there == "file":
        target.write_text("precious")
    else:
        target.symlink_to("nowhere")
    before = contents(tmp_path)
    result = nmbench("new-plugin", "acme")
    assert result.exit_code == 1
    assert (
        result.stderr
        == "Error: nmbench-acme exists and is left as it is; choose another name or --out, or remove it.\n"
    )
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["Acme", "2acme", "acme_2", "acme--2", "-acme", "acme-", "a.b", "../acme", "a b", "", "é", "a" * 41]
)
def test_illegal_names(name, tmp_path):
    """A name that cannot be a method and part of a package's name is refused in one line; nothing is written."""
    with pytest.raises(NMBenchError, match="is not legal") as caught:
        new_plugin(name, "scorer", tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["none", "true"])
def test_names_that_python_keeps_for_itself(name):
    """A name whose class would be a word of Python is refused."""
    with pytest.raises(NMBenchError, match="means something in Python"):
        check_name(name, None)


def test_a_taken_name(nmbench, tmp_path):
    """The name of a method that is there already is refused, with its origin."""
    result = nmbench("new-plugin", "wanda")
    assert result.exit_code == 1
    assert "method 'wanda' is already provided by nmbench" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_kind(nmbench):
    """A kind that there is no template for is wrong usage."""
    assert nmbench("new-plugin", "acme", "--kind", "metric").exit_code == 2
