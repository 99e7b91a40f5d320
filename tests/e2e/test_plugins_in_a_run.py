"""Third-party plugins in a run: a five-line method works; broken ones cost their own row and nothing else."""

from __future__ import annotations

import textwrap

import pytest

HEAD = """
from dataclasses import dataclass
import torch
import nmbench

@nmbench.hookimpl
def nmbench_register_baselines(register):
    register("mine", Mine)

"""
BROKEN = {
    "raises": (
        "Scorer",
        "    def score(self, weight, stats):\n        raise RuntimeError('no\\n  idea')\n",
        "RuntimeError: no idea",
    ),
    "wrong shape": ("Scorer", "    def score(self, weight, stats):\n        return weight[:1]\n", "scores have shape"),
    "NaN scores": (
        "Scorer",
        "    def score(self, weight, stats):\n        return weight * torch.nan\n",
        "must be finite",
    ),
    "calls exit": ("Scorer", "    def score(self, weight, stats):\n        raise SystemExit(0)\n", "SystemExit"),
    "mask of the wrong shape": (
        "Solver",
        "    def solve(self, weight, stats, pattern):\n        return nmbench.Pruned(pattern.top(weight)[:-1])\n",
        "mask of shape",
    ),
    "mask that is no mask": (
        "Solver",
        "    def solve(self, weight, stats, pattern):\n        return nmbench.Pruned(pattern.top(weight).float())\n",
        "instead of torch.bool",
    ),
    "one weight too many": (
        "Solver",
        "    def solve(self, weight, stats, pattern):\n"
        "        mask = pattern.top(weight.abs())\n        mask[1, 4:8] = True\n        return nmbench.Pruned(mask)\n",
        "mine broke 2:4 in model.layers.0.self_attn.q_proj: 1 of 1024 groups; first: row 1, columns 4..7 keep 4 "
        "instead of 2.",
    ),
    "weights off the mask": (
        "Solver",
        "    def solve(self, weight, stats, pattern):\n"
        "        return nmbench.Pruned(pattern.top(weight.abs()), weight)\n",
        "non-zero weights off the mask",
    ),
}


def plugin(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(HEAD + textwrap.dedent(text))
    return path


def test_a_method_in_one_file(nmbench, small, records, tmp_path):
    """A scorer of a few lines, given with --plugin, is compared like the built-in ones; its row says it is strict."""
    path = plugin(
        tmp_path,
        '''
        @dataclass(frozen=True)
        class Mine(nmbench.Scorer):
            """Keep the smallest weights, to see what happens."""
            sign: float = nmbench.option(-1.0, "times |w|")
            def score(self, weight, stats):
                return self.sign * weight.abs()
        ''',
    )
    flags = ["--plugin", path, "--method", "mine", "--method", "same=mine", "--set", "same.sign=1"]
    result = nmbench("run", *small, *flags, "--method", "magnitude")
    assert result.exit_code == 0, result.output
    rows = {row["label"]: row for row in records(tmp_path / "out")}
    assert rows["mine"]["strict"] is True
    assert rows["same"]["metrics"] == rows["magnitude"]["metrics"]
    assert rows["same"]["options"] == {"sign": 1.0}
    assert "mine" in nmbench("methods", "--plugin", path).output
    assert "--set mine.sign=-1.0" in nmbench("methods", "mine", "--plugin", path).output


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_method_costs_its_own_row_only(nmbench, small, records, tmp_path, name):
    """Its row is marked failed with the reason, has no numbers, and the others are as without it."""
    base, body, message = BROKEN[name]
    path = plugin(tmp_path, f"@dataclass(frozen=True)\nclass Mine(nmbench.{base}):\n{body}")
    flags = small[: small.index("--set")]
    assert nmbench("run", *flags, "--method", "magnitude", "--out", "alone").exit_code == 0
    result = nmbench("run", *flags, "--plugin", path, "--method", "mine", "--method", "magnitude", "--out", "out")
    assert result.exit_code == 1
    rows = {row["label"]: row for row in records(tmp_path / "out")}
    assert rows["mine"]["status"] == "failed"
    assert message in rows["mine"]["error"]
    assert rows["mine"]["metrics"] == {}
    assert (tmp_path / "out" / rows["mine"]["traceback"]).read_text().startswith("Traceback")
    assert "FAILED" in result.stdout
    alone = {row["label"]: row for row in records(tmp_path / "alone")}
    assert rows["magnitude"]["metrics"] == alone["magnitude"]["metrics"]
    assert rows["magnitude"]["proof"] == alone["magnitude"]["proof"]


def test_a_failed_job_is_tried_again(nmbench, small, records, tmp_path):
    """After the plugin is mended the same command does the failed job and no other."""
    broken = (
        "@dataclass(frozen=True)\nclass Mine(nmbench.Scorer):\n    def score(self, weight, stats):\n        return "
    )
    flags = [*small[: small.index("--set")], "--method", "mine", "--out", "out"]
    assert nmbench("run", *flags, "--plugin", plugin(tmp_path, broken + "None.none\n")).exit_code == 1
    result = nmbench("run", *flags, "--plugin", plugin(tmp_path, broken + "weight.abs()\n"))
    assert result.exit_code == 0, result.output
    assert [row["status"] for row in records(tmp_path / "out")] == ["ok", "failed", "ok"]
    assert "FAILED" not in result.stdout


def test_a_metric_cannot_change_what_it_measures(nmbench, small, records, tmp_path):
    """A metric that tampers with the weights is found out by the check after the measurement."""
    path = plugin(
        tmp_path,
        """
        Mine = type("Mine", (nmbench.Scorer,), {"score": lambda self, weight, stats: weight.abs()})

        class Tamper(nmbench.Metric):
            def measure(self, subject, dense):
                if dense.cached:
                    next(iter(subject.bundle.layers.values())).read().fill_(1.0)
                subject.cached["x@1"] = torch.zeros(3, dtype=torch.float64)
                return {"tamper": {"value": 1.0, "stderr": None, "n": 1, "lower_is_better": True}}

        @nmbench.hookimpl
        def nmbench_register_metrics(register):
            register("tamper", Tamper)
        """,
    )
    flags = [flag for flag in small[: small.index("--set")] if not flag.startswith("ppl:")]
    flags[flags.index("--metric") + 1 : flags.index("--metric") + 1] = ["tamper"]
    result = nmbench("run", *flags, "--plugin", path, "--method", "magnitude", "--out", "out")
    assert result.exit_code == 1
    rows = {row["label"]: row for row in records(tmp_path / "out")}
    assert rows["magnitude"]["status"] == "failed"
    assert "off the mask" in rows["magnitude"]["error"] or "changed while" in rows["magnitude"]["error"]
    assert rows["magnitude"]["metrics"] == {}


def test_a_plugin_that_cannot_be_imported_stops_only_those_who_need_it(nmbench, small, tmp_path):
    """It is listed with its failure, the built-in methods work, and asking for its method names it."""
    path = tmp_path / "broken.py"
    path.write_text("import no_such_module\n")
    assert nmbench("run", *small, "--plugin", path).exit_code == 0
    listed = nmbench("plugins", "--plugin", path)
    assert listed.exit_code == 1
    assert "FAILED at import: ModuleNotFoundError: No module named 'no_such_module'" in listed.output
    result = nmbench("run", *small[:-2], "--plugin", path, "--method", "mine", "--out", "other")
    assert result.exit_code == 1
    assert "unknown method 'mine'" in result.stderr
    assert "failed at import" in result.stderr


def test_a_plugin_with_a_taken_name_is_refused(nmbench, small, tmp_path):
    """The name keeps its first owner, and the message names both."""
    path = plugin(tmp_path, "class Mine(nmbench.Scorer):\n    pass\n")
    path.write_text(path.read_text().replace('"mine"', '"magnitude"'))
    listed = nmbench("plugins", "--plugin", path)
    assert listed.exit_code == 1
    assert "already provided by nmbench" in listed.output
    assert "mine.py" in listed.output


def test_an_observer_that_raises_is_reported_once_and_stops_nothing(nmbench, small, tmp_path, caplog):
    """A failing observer never kills a run."""
    path = tmp_path / "watcher.py"
    path.write_text(
        "import nmbench\n@nmbench.hookimpl\ndef nmbench_progress(event):\n    raise ValueError('tired')\n"
        "@nmbench.hookimpl\ndef nmbench_method_finished(record):\n"
        "    with open('seen', 'a') as file:\n        file.write(record['label'] + ' ')\n"
    )
    assert nmbench("run", *small, "--plugin", path).exit_code == 0
    assert (tmp_path / "seen").read_text() == "dense maskpro@init maskpro "
    assert sum("failed in nmbench_progress" in record.message for record in caplog.records) == 1
