"""Several models, methods, patterns and seeds in one TOML file."""

from __future__ import annotations

import pytest

from nmbench.cli.grid import cells, folder_of
from nmbench.errors import NMBenchError

METHODS = {"magnitude": {}}
FILE = """
models = ["tiny:llama", "tiny:none", "tiny:gpt2"]
calibration = "text:{texts}/cal.txt"
metrics = ["ppl:text:{texts}/test.txt@64"]
windows = 4
window_tokens = 64
seeds = [0]

[[grid]]
patterns = ["2:4"]
[grid.methods.magnitude]
[grid.methods.wanda]

[[grid]]
models = ["tiny:llama"]
patterns = ["1:4"]
[grid.methods.magnitude]
"""


def test_a_grid_is_runs_of_plain_data():
    """Models are multiplied by tables; a key of a table takes the place of the key above; flags go before all."""
    content = {"models": ["a", "b"], "seeds": [0], "methods": METHODS, "grid": [{"seeds": [1]}, {"models": ["c"]}]}
    found = cells(content, {}, "it.toml")
    assert [(cell["model"], cell["seeds"], folder) for cell, folder in found] == [
        ("a", [1], "a"),
        ("b", [1], "b"),
        ("c", [0], "c"),
    ]
    assert [cell["model"] for cell, _ in cells(content, {"model": "d"}, "it.toml")] == ["d", "d"]
    assert cells({"methods": METHODS}, {}, "it.toml") == [({"methods": METHODS}, None)]


def test_models_have_folders_of_their_own():
    """A folder is named after its model; two models that would share a name are told apart."""
    both = [{"model": "hf:a/b"}, {"model": "hf:a-b"}]
    assert folder_of("hf:a/b", both[:1]) == "hf-a-b"
    assert folder_of("hf:a/b", both) != folder_of("hf:a-b", both)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"grid": {}}, r"grid in it.toml must be tables; begin each with \[\[grid\]\]"),
        ({"models": "tiny:llama"}, "models in it.toml must be a list of str, not 'tiny:llama'"),
        ({"models": ["a"], "model": "b"}, "names both model and models"),
    ],
)
def test_malformed_grids(content, said):
    """A grid that is none is one line with the remedy."""
    with pytest.raises(NMBenchError, match=said):
        cells(content, {}, "it.toml")


def test_a_grid_is_run(nmbench, texts, records, tmp_path):
    """Every model has its run directory below --out, tables extend it, and a model that fails costs itself only."""
    (tmp_path / "grid.toml").write_text(FILE.format(texts=texts))
    planned = nmbench("run", "--config", "grid.toml", "--out", "out", "--dry-run")
    assert planned.stdout.count("magnitude 2:4 seed 0") == 3
    result = nmbench("run", "--config", "grid.toml", "--out", "out", "--quiet")
    assert result.exit_code == 1
    assert "Error: tiny:none: " in result.stderr
    rows = [(row["label"], row["pattern"]) for row in records(tmp_path / "out/tiny-llama")]
    assert rows == [("dense", None), ("magnitude", "2:4"), ("wanda", "2:4"), ("magnitude", "1:4")]
    assert [row["label"] for row in records(tmp_path / "out/tiny-gpt2")] == ["dense", "magnitude", "wanda"]
    assert nmbench("report", "out/tiny-llama", "out/tiny-gpt2").exit_code == 0


def test_two_protocols_in_one_directory_are_refused(nmbench, texts, tmp_path):
    """Tables of one model with different windows cannot share its directory: said before anything is done."""
    text = FILE.format(texts=texts).replace('patterns = ["1:4"]', "windows = 3")
    (tmp_path / "grid.toml").write_text(text)
    result = nmbench("run", "--config", "grid.toml", "--out", "out")
    assert result.exit_code == 1
    assert "two tables of the grid measure tiny:llama by different protocols" in result.stderr
    assert not (tmp_path / "out").exists()
