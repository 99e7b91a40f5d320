"""The scripts of learners: few windows, learners side by side, and memory with weights in 8 bits."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from nmbench.results.results import load_results
from nmbench_plugins.demo import DemoPlays
from reference.run_directory import record_of, write_run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Load a script as a module, with those beside it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name):
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return lambda *arguments: (monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)]), module.main())

    yield load
    sys.modules.pop("finished_rows", None)


def test_few_windows_of_a_tiny_model(script, monkeypatch, tmp_path, capsys):
    """A row for every number of windows; the losses are those of the masks in the run directory."""
    paths = {split: tmp_path / split for split in ("calibration", "test")}
    for split, path in paths.items():
        path.write_text(next(iter(DemoPlays().texts(split)))[:4000], encoding="utf-8")
    (tmp_path / "run.toml").write_text("windows = 2\nwindow_tokens = 32\npool_tokens = 512\nselection_tokens = 256\n")
    main = script("few_windows")
    monkeypatch.setattr(sys.modules["few_windows"], "WINDOW", 16)
    about = ("--model", "tiny:llama", "--config", tmp_path / "run.toml", "--init", "magnitude", "--seeds", 0)
    texts = ("--calibration", f"text:{paths['calibration']}", "--metric", f"ppl:text:{paths['test']}@32")
    learner = ("--learner", "maskpro", "--windows", 1, "all", "--steps", 2)
    main(*about, *texts, *learner, "--out", tmp_path / "few", "--json", tmp_path / "few.json")
    rows = json.loads((tmp_path / "few.json").read_text())["rows"]
    assert [(row["windows"], row["returned"]) for row in rows] == [("1", "initial"), ("all", "initial")]
    assert all(row["training"][0] == row["training"][1] > 0 and row["groups_changed"] == 0 for row in rows)
    cost = {record["label"]: record["cost"] for record in load_results(tmp_path / "few").records}
    assert cost["maskpro-1"]["unique_tokens"] == 16 < cost["maskpro-all"]["unique_tokens"]
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2


def test_learners_side_by_side(script, tmp_path, capsys):
    """The gain of every learner over that of another one on the same start and seed."""

    def row(label, perplexity, seed, **fields):
        metric = {"ppl:demo@8": {"value": perplexity, "lower_is_better": True}}
        return record_of(label, seed=seed, metrics=metric, losses=None, **fields)

    dense = {**record_of("dense", None, None, losses=None), "metrics": row("x", 10.0, 0)["metrics"]}
    start = {"options": {"init": "swaps"}, "started_from": "swaps"}
    runs = []
    for seed, gained in ((0, 20.0), (1, 25.0)):
        learners = [row("swaps-judged", 40.0, seed, **start), row("flips", gained, seed, **start)]
        runs.append(write_run(tmp_path / f"run{seed}", [dense, row("swaps", 80.0, seed), *learners]))
    script("learners")(*runs, "--against", "swaps-judged", "--json", tmp_path / "gains.json")
    found = json.loads((tmp_path / "gains.json").read_text())["against"]
    assert [(one["label"], one["seed"], one["times"]) for one in found] == [("flips", 0, 2.0), ("flips", 1, 1.678)]
    assert "flips gains 2.00 and 1.68 times what swaps-judged gains" in capsys.readouterr().out


def test_rows_of_eight_bit_outlive_the_script(script, monkeypatch, tmp_path):
    """A script that is ended keeps the rows that it has printed."""
    main = script("eight_bit")
    rows = iter([dict.fromkeys(("model", "held", "held_in_blocks", "peak", "seconds"), 1.0)] * 3)

    def measured(*_):
        if (row := next(rows, None)) is None:
            raise KeyboardInterrupt
        return row

    monkeypatch.setattr(sys.modules["eight_bit"], "measured", measured)
    with pytest.raises(KeyboardInterrupt):
        main("--device", "cpu", "--json", tmp_path / "eight.json")
    kept = json.loads((tmp_path / "eight.json").read_text())["rows"]
    assert [(row["learner"], row["weights"]) for row in kept][1:] == [
        ("maskpro", "int8"),
        ("maskpro, torch engine", "bfloat16"),
    ]
