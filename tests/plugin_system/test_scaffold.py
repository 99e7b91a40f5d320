"""`nmbench new-plugin`: the package builds, installs, passes its own tests and takes part in a comparison."""

from __future__ import annotations

import importlib
import itertools
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.errors import NMBenchError
from nmbench.methods import Pruned
from nmbench.pattern import Pattern
from nmbench.plain_data import read_toml
from nmbench.plugins.scaffold import KINDS, check_name, new_plugin
from nmbench.testing.strategies import layers

NAMES = {
    **{"scorer": "acme", "solver": "acme-2", "refiner": "acme-3", "repair": "acme-5", "learner": "my-own-method"},
    "metric": "acme-4",
}
METHODS = [name for kind, name in NAMES.items() if KINDS[kind].registers == "method"]
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
    (folder / "wheels").mkdir()
    wheels = [built(folder / f"nmbench-{name}", folder / "wheels") for name in NAMES.values()]
    command = ["pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site), *wheels]
    call(dict(os.environ), folder, *command)
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def built(root, wheels):
    """The path of the wheel that the package's own build backend makes, in this process: pip would start three."""
    backend = importlib.import_module(read_toml(root / "pyproject.toml")["build-system"]["build-backend"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        return str(wheels / backend.build_wheel(str(wheels)))


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
    """A package has its module, tests, a project file with the entry point, and nothing left to fill.

    A method has three lines of tests.
    """
    name = NAMES[kind]
    root = folder / f"nmbench-{name}"
    module = f"nmbench_{name.replace('-', '_')}"
    assert all((root / file).is_file() for file in FILES)
    project = read_toml(root / "pyproject.toml")["project"]
    assert project["name"] == f"nmbench-{name}"
    assert project["entry-points"] == {"nmbench": {name: module}}
    (tests,) = (root / "tests").iterdir()
    if name in METHODS:
        assert len([line for line in tests.read_text().splitlines() if line]) == 3
    assert f'register("{name}", ' in (root / "src" / module / "__init__.py").read_text()
    everything = "".join(path.read_text() for path in root.rglob("*") if path.is_file())
    assert "%{" not in everything
    assert "nmbench_nmbench" not in everything


@pytest.fixture(scope="module")
def reports(folder, environment, python):
    """The report of every package on its own tests."""
    roots = {kind: folder / f"nmbench-{name}" for kind, name in NAMES.items()}
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    return {kind: check(python.run(*command, cwd=root, env=environment)) for kind, root in roots.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_passes_its_own_tests(reports, kind):
    """As installed, away from its sources, it passes every law; that of a metric, every test of its own."""
    assert re.search(r"^\d\d passed in", reports[kind], re.MULTILINE), reports[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_is_free_of_lint(folder, kind):
    """ruff, with the settings of the package, finds no error."""
    pytest.importorskip("ruff")
    root = folder / f"nmbench-{NAMES[kind]}"
    for command in (["check"], ["format", "--check"]):
        call(dict(os.environ), root, "ruff", *command, "--no-cache")


def test_new_plugins_in_a_comparison(folder, environment, nmbench, small, records, tmp_path, monkeypatch):
    """All are listed with their package; the methods are compared with a built-in one, by the metric as well."""
    monkeypatch.syspath_prepend(str(folder / "site"))
    listed = nmbench("plugins").output
    for name in NAMES.values():
        assert re.search(rf"^nmbench-{name} 0\.1\.0 \[{name}\]: .*nmbench_register", listed, re.MULTILINE), listed
    flags = [*small[: small.index("--set")], "--out", "out", "--quiet", "--method", "wanda"]
    methods = [flag for name in METHODS for flag in ("--method", name)]
    steps = ["--set", f"{NAMES['learner']}.steps=3"]
    metric = small[small.index("--metric") + 1].replace("ppl:", f"{NAMES['metric']}:")
    result = nmbench("run", *flags, *methods, *steps, "--metric", metric)
    assert result.exit_code == 0, result.output
    rows = records(tmp_path / "out")
    compared = {row["label"]: row for row in rows if row["label"] != "dense"}
    assert set(compared) == {"wanda", f"{NAMES['learner']}@init", *METHODS}
    assert all(row["status"] == "ok" and row["strict"] for row in compared.values())
    assert compared[NAMES["repair"]]["started_from"] == "wanda"
    changed = {row["label"] for row in rows if row["weights_changed"]}
    undone = not compared[NAMES["repair"]]["notes"]["confirmation"]["holds"]
    assert changed == {NAMES["solver"]} | (set() if undone else {NAMES["repair"]})
    assert all(0 < row["metrics"][metric]["value"] <= 1 for row in rows)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_new_refiner_ends_where_no_exchange_helps(folder, data):
    """After enough sweeps no exchange within a group lowers the error of a row, all of them tried one by one."""
    pattern = Pattern(*data.draw(st.sampled_from([(2, 4), (1, 4), (3, 5)])))
    weight, stats = data.draw(layers(pattern))
    before = pattern.top(weight.abs())
    module = runpy.run_path(str(folder / "nmbench-acme-3/src/nmbench_acme_3/__init__.py"))
    after = module["Acme3"](sweeps=50).refine(weight, stats, before, pattern).mask
    gram = stats.gram.double()

    def error(row, mask):
        lost = weight[row].double() * ~mask
        return float(lost @ gram @ lost)

    for row, mask in enumerate(after):
        reached, rounding = error(row, mask), 1e-5 * error(row, torch.zeros_like(mask)) + 1e-6
        assert reached <= error(row, before[row]) + rounding
        for drop, restore in itertools.product(mask.nonzero().flatten(), (~mask).nonzero().flatten()):
            if drop // pattern.group == restore // pattern.group:
                other = mask.clone()
                other[drop], other[restore] = False, True
                assert error(row, other) >= reached - rounding


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_new_repair_takes_the_best_factor(folder, data):
    """No other factor, within the limit, brings the outputs of a row closer to the dense ones."""
    pattern = Pattern(*data.draw(st.sampled_from([(2, 4), (1, 4), (3, 5)])))
    weight, stats = data.draw(layers(pattern))
    mask = pattern.top(weight.abs())
    kept = weight.masked_fill(~mask, 0.0)
    module = runpy.run_path(str(folder / "nmbench-acme-5/src/nmbench_acme_5/__init__.py"))
    repaired = module["Acme5"]().repair(weight, stats, Pruned(mask, kept), pattern).weight
    gram = stats.gram.double()
    for dense, start, found in zip(weight.double(), kept.double(), repaired.double(), strict=True):

        def error(row, dense=dense):
            return float((dense - row) @ gram @ (dense - row))

        rounding = 1e-5 * error(torch.zeros_like(dense)) + 1e-6
        for factor in (0.25, 0.9, 1.0, 1.1, 2.0, 4.0):
            assert error(found) <= error(factor * start) + rounding


# What is refused


def contents(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("there", ["folder", "file", "broken link"])
def test_nothing_is_overwritten(nmbench, tmp_path, there):
    """An existing path of that name stays unchanged, and the message names it."""
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
        check_name(name, "scorer", None)


@pytest.mark.parametrize(("kind", "name"), [("scorer", "wanda"), ("refiner", "maskpro"), ("metric", "ppl")])
def test_a_taken_name(nmbench, tmp_path, kind, name):
    """The name of a registered method or metric is refused, with its origin."""
    result = nmbench("new-plugin", name, "--kind", kind)
    assert result.exit_code == 1
    assert f"{KINDS[kind].registers} {name!r} is already provided by nmbench" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "shown"), [("refiner", "nmbench methods ppl"), ("metric", "nmbench plugins")])
def test_what_to_do_next(nmbench, kind, shown):
    """The last line shows how to install, test and show the plugin; methods and metrics have separate names."""
    name = {"refiner": "ppl", "metric": "wanda"}[kind]
    result = nmbench("new-plugin", name, "--kind", kind)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f"\nNext: cd nmbench-{name} && pip install -e '.[test]' && pytest && {shown}\n")


def test_an_unknown_kind(nmbench):
    """A kind that there is no template for is wrong usage."""
    assert nmbench("new-plugin", "acme", "--kind", "sorcerer").exit_code == 2
