"""The script that times packed products runs: on a CPU with tiny layers, where its speeds mean nothing."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def test_the_script_runs_on_a_cpu(monkeypatch, tmp_path, capsys):
    """Products and generation of a tiny shape: right results, the bound of the bytes, and equal tokens."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    arguments = ["--device", "cpu", "--pattern", "2:4", "--batch", "1", "--batch", "3", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", ["packed_linear.py", *arguments, "--json", str(tmp_path / "figures.json")])
    for name in ("packed_linear", "shapes", "timing"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import packed_linear

    packed_linear.main()
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["copy_gb"] > 0 and found["shape"] == "tiny"
    assert [(row["out"], row["in"]) for row in found["products"][::2]] == [(192, 64), (64, 192), (64, 64), (32, 64)]
    for row in found["products"]:
        assert row["relative_error"] < 0.01
        assert row["ratio"] == pytest.approx(row["dense_us"] / row["packed_us"], rel=0.02, abs=0.001)
        assert 1 < row["bound"] < 16 / 9
    assert [row["batch"] for row in found["generation"]] == [1, 3]
    assert all(row["equal_tokens"] == 1.0 and row["layers"] == 14 for row in found["generation"])
    assert len(capsys.readouterr().out.splitlines()) == 1 + 8 + 2
    for name in ("packed_linear", "shapes", "timing"):
        sys.modules.pop(name, None)
