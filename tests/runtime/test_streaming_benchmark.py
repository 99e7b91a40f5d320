"""The script that compares walks of streamed models: what it stores while it runs. Nothing is loaded."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SECONDS = {"resident": 4.0, "host": 6.0, "host, passes too": 7.0, "disk": 8.0}
FIGURES = {"overlap": None, "losses_seconds": 1.0, "device_bytes": None, "host_bytes": 1, "host_estimate": 1}


def test_every_mode_is_stored_when_it_is_done(monkeypatch, tmp_path, capsys):
    """A script that ends early keeps the rows that it has, with their ratios, and leaves no model on the disk."""
    for name in ("streaming", "shapes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import streaming

    def child(args, mode, folder):
        if mode not in SECONDS:
            sys.exit("killed")
        return {"mode": mode, "walk_seconds": SECONDS[mode], **FIGURES}

    monkeypatch.setattr(streaming, "child", child)
    monkeypatch.setattr(streaming, "write_model", lambda *given: 2**30)
    monkeypatch.setattr(streaming, "reading_rate", lambda path: 2.0**30)
    monkeypatch.setattr(streaming.signal, "signal", lambda *given: None)
    flags = ("--device", "cpu", "--blocks", "3", "--folder", str(tmp_path), "--json", str(tmp_path / "found.json"))
    monkeypatch.setattr(sys, "argv", ["streaming.py", *flags])
    with pytest.raises(SystemExit, match="killed"):
        streaming.main()
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["expected_seconds"] == 3 * 2 + 1
    assert [(row["mode"], row["ratio"], row["of_time"]) for row in found["rows"]] == [
        ("resident", 1.0, None),
        ("host", 1.5, None),
        ("host, passes too", 1.75, None),
        ("disk", 2.0, 8 / 7),
    ]
    printed = [line.split(" |")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert printed == ["| mode", "| resident", "| host", "| host, passes too", "| disk"]
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
    for name in ("streaming", "shapes"):
        sys.modules.pop(name, None)
