"""The recipe of the big table: its specification is one that nmbench takes, and its script makes one table of runs."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from nmbench.experiment.plan import checked
from nmbench.plain_data import read_toml
from nmbench.plugins.loading import load_plugins
from nmbench.spec import RunSpec

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def real_model(monkeypatch):
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("real_model", BENCHMARKS / "real_model.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "real_model", module)
    spec.loader.exec_module(module)
    return lambda *arguments: (monkeypatch.setattr(sys, "argv", ["real_model.py", *arguments]), module.main())


@pytest.fixture
def runs(finished, small):
    """Two runs of one protocol, a seed each, with a learner, a method of repaired weights, and layer errors."""
    text = small[small.index("--metric") + 1].removeprefix("ppl:")
    flags = [*small[: small.index("--method")], "--metric", f"layers:{text}", "--method", "wanda"]
    for seed in (0, 1):
        methods = ["--method", "maskpro", "--method", "sparsegpt", "--seed", seed, "--out", f"run{seed}"]
        finished(*flags, *methods)
    finished(*flags, "--window-tokens", 32, "--method", "maskpro", "--out", "other")


def test_the_specification_is_sound():
    """Every method and option of the recipe exists; a learner's start has no other name than that of its method."""
    plugins = load_plugins(entry_points=None)
    spec = RunSpec.from_dict(read_toml(BENCHMARKS / "smollm2.toml"))
    labels = [contender.label for contender in checked(spec, plugins).contenders]
    assert {"magnitude", "wanda", "sparsegpt", "sparsegpt-mask", "swaps", "swaps-judged", "maskpro"} <= {*labels}


def test_one_table_of_two_runs(runs, real_model, records, capsys, tmp_path):
    """Rows are means over the seeds of both runs, best first, with what they are compared with; nothing is lost."""
    real_model("run0", "run1", "--json", "found.json")
    text = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    head, _, dense, *rows = lines
    assert dense[0] == "dense" and dense[head.index("nats over dense")] == ""
    assert sorted(row[0] for row in rows) == ["maskpro", "maskpro@init", "sparsegpt", "wanda"]
    assert {row[head.index("seeds")] for row in rows} == {"2"}
    metric = next(name for name in head if name.startswith("ppl:text:test.txt"))
    assert all("±" in row[head.index(metric)] for row in rows)
    nats = [float(row[head.index("nats over dense")].split()[0]) for row in rows]
    assert nats == sorted(nats)
    assert "- sparsegpt 2:4: model.layers." in text
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert [row["label"] for row in found["rows"]] == ["dense", *(row[0] for row in rows)]
    assert str(tmp_path) not in json.dumps(found)
    both = [*records(tmp_path / "run0"), *records(tmp_path / "run1")]
    for row in found["rows"][1:]:
        given = [next(iter(record["metrics"].values())) for record in both if record["label"] == row["label"]]
        assert [seed["metrics"][metric]["value"] for seed in row["seeds"]] == [one["value"] for one in given]


@pytest.mark.parametrize(
    ("folders", "words"), [(["run0", "run0"], "is in two runs"), (["run0", "other"], "different protocols")]
)
def test_runs_that_do_not_go_together(runs, real_model, folders, words):
    """The same run twice, or runs of two protocols, make no table."""
    with pytest.raises(SystemExit, match=words):
        real_model(*folders)
