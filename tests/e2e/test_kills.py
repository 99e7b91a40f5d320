"""Kills at file operations and at random moments: the short version of `benchmarks/kill_test.py`."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill_test.py"


@pytest.mark.slow
def test_kills_change_nothing(tmp_path):
    """Killed at every fifth point around a file operation, or at any moment, a run ends with the same files."""
    spec = importlib.util.spec_from_file_location("kill_test", SCRIPT)
    kill_test = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kill_test)
    args = argparse.Namespace(model="tiny:llama", every=5, random=3, seed=0)
    result = kill_test.harness(args, tmp_path)
    assert result["differences"] == []
    assert result["kills"] >= result["points"] // 5
