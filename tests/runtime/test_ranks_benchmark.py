"""The script that times ranks runs: two ranks on a CPU with a tiny shape, where its speeds mean nothing."""

import json
import sys
from pathlib import Path

import pytest

from reference.ranks import started

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FLAGS = (
    *("--shape", "tiny", "--device", "cpu", "--minibatch", "4", "--window-tokens", "16", "--steps", "2"),
    *("--methods", "maskpro", "soft", "wanda", "sparsegpt", "--windows", "8", "--repeats", "1"),
)


def test_the_script_runs_on_a_cpu(monkeypatch, tmp_path, python):
    """Learners at both kinds of minibatch, and walks, by two ranks beside one process; ratios are those of speeds."""
    flags = [*FLAGS, "--warm-up", "1", "--worker"]
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    program = "import runpy, sys; sys.path.insert(0, sys.argv[1]); runpy.run_path(sys.argv.pop(1) + '/ranks.py', {}, "
    programs = started(python, 2, tmp_path, "-c", program + "'__main__')", str(BENCHMARKS), *flags, str(two))
    for name in ("ranks", "shapes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["ranks.py", *flags, str(one)])
    import ranks

    ranks.main()
    assert [(program.wait(), program.communicate()) for program in programs] == 2 * [(0, ("", ""))]
    rows = ranks.with_ratios([row for path in (one, two) for row in json.loads(path.read_text())])
    learners, walks = ([row for row in rows if (row["method"] in ranks.WALKS) is walks] for walks in (False, True))
    assert [(row["method"], row["ranks"], row["fixed"], row["minibatch"]) for row in learners] == [
        *[(method, 1, "per rank", 4) for method in ("maskpro", "soft")],
        *[(method, 2, *mode) for method in ("maskpro", "soft") for mode in (("per rank", 8), ("in all", 4))],
    ]
    assert [row["ratio"] for row in learners[:2]] == [1.0, 1.0]
    assert learners[2]["ratio"] == pytest.approx(
        learners[2]["tokens_per_second"] / learners[0]["tokens_per_second"], abs=1e-3
    )
    assert learners[0]["masks"] == learners[3]["masks"] != learners[2]["masks"]
    assert [(row["method"], row["ranks"]) for row in walks] == [
        *(("wanda", 1), ("sparsegpt", 1), ("wanda", 2), ("sparsegpt", 2))
    ]
    for row in walks:
        assert row["making"] > 0
        assert row["tokens_per_second"] == pytest.approx(8 * 16 / row["seconds"], rel=0.01)
    assert [row["masks"] for row in walks[:2]] == [row["masks"] for row in walks[2:]]
    for name in ("ranks", "shapes"):
        sys.modules.pop(name, None)
