"""The script that measures the overhead of checkpoints, records and progress."""

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from nmbench_plugins.demo import DemoPlays

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "overhead.py"


@pytest.fixture
def overhead(monkeypatch, tmp_path):
    """The script, as a module, for the sizes of a tiny model."""
    spec = importlib.util.spec_from_file_location("overhead", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "overhead", module)
    spec.loader.exec_module(module)
    sizes = {"windows": 2, "window_tokens": 32, "pool_tokens": 512, "selection_tokens": 256}
    monkeypatch.setattr(module, "SIZES", sizes)
    monkeypatch.setattr(module, "TEST_CHARACTERS", 600)
    (tmp_path / "calibration").write_text(next(iter(DemoPlays().texts("calibration")))[2000:10000], encoding="utf-8")
    monkeypatch.setattr(module, "CALIBRATION", f"text:{tmp_path}/calibration")
    return module


def test_the_script_runs_on_a_tiny_model(overhead, monkeypatch, tmp_path, capsys):
    """A real run in the condition `live` counts every call; percentages are those of medians beside the bare runs."""
    seconds, once = {"bare": 2.0, "checkpoints": 2.02, "lines": 2.1, "live": 2.2}, overhead.once
    inside, made = {}, []

    def given(args, condition, calls):
        if not made:
            _, found, results = once(args, "live", calls)
            inside.update(found)
            made.extend([results, Counter(calls)])
        calls.update(made[1])
        return seconds[condition], dict.fromkeys(inside, 0.022), made[0]

    monkeypatch.setattr(overhead, "once", given)
    flags = ["--model", "tiny:llama", "--steps", "2", "--rounds", "2", "--json", str(tmp_path / "figures.json")]
    monkeypatch.setattr(sys, "argv", ["overhead.py", *flags])
    overhead.main()
    found = json.loads((tmp_path / "figures.json").read_text())
    assert made[1] == {"records": 3, "losses": 3, "masks": 2, "checkpoints": 1, "observers": made[1]["observers"]}
    assert all(spent > 0 for spent in inside.values())
    assert found["percent_over_bare"] == {"bare": 0, "checkpoints": 1, "lines": 5, "live": 10}
    assert found["percent_inside_calls"] == dict.fromkeys(overhead.TIMED, 1.0)
    assert {name: len(one) for name, one in found["seconds"].items()} == dict.fromkeys(overhead.CONDITIONS, 2)
    assert "| live | 2.20 | +10.00 % | 0.0 % |" in capsys.readouterr().out
