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
        "one-weight-too-many broke 2:4 in model.layers.0.self_attn.q_proj: 1 of 1024 groups; first: row 1, "
        "columns 4..7 keep 4 instead of 2.",
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


@pytest.fixture
def broken(nmbench, made, small, tmp_path_factory):
    """A run of all broken methods, with a good one behind each of them, and its flags."""
    flags = small[: small.index("--set")]
    for name, (base, body, _) in BROKEN.items():
        method = name.replace(" ", "-").lower()
        path = tmp_path_factory.getbasetemp() / f"{method}.py"
        text = f"{HEAD}@dataclass(frozen=True)\nclass Mine(nmbench.{base}):\n{body}"
        path.write_text(text.replace('"mine"', repr(method)), encoding="utf-8")
        flags += ["--plugin", str(path), "--method", method, "--method", f"after-{method}=wanda"]
    return made(nmbench, (*flags, "--method", "before=wanda", "--out", "out"))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_method_costs_its_own_row_only(nmbench, finished, broken, small, records, tmp_path, name):
    """Its row is marked failed with the reason, has no numbers, and the others are as without it."""
    result, folder = broken
    assert result.exit_code == 1
    rows = {row["label"]: row for row in records(folder / "out")}
    method = name.replace(" ", "-").lower()
    assert rows[method]["status"] == "failed"
    assert BROKEN[name][2] in rows[method]["error"]
    assert rows[method]["metrics"] == {}
    assert (folder / "out" / rows[method]["traceback"]).read_text().startswith("Traceback")
    assert "FAILED" in result.stdout
    finished(*small[: small.index("--set")], "--method", "wanda", "--out", "alone")
    alone = {row["label"]: row for row in records(tmp_path / "alone")}
    assert rows[f"after-{method}"]["metrics"] == alone["wanda"]["metrics"]
    assert rows[f"after-{method}"]["proof"] == alone["wanda"]["proof"]


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


@pytest.mark.parametrize("change", ["fill_(1.0)", "mul_(2)"])
def test_a_metric_cannot_change_what_it_measures(nmbench, small, records, tmp_path, change):
    """A metric that tampers with weights, pruned or kept, is found out by the check after the measurement."""
    path = plugin(
        tmp_path,
        """
        @dataclass(frozen=True)
        class Mine(nmbench.Scorer):
            def score(self, weight, stats):
                return weight.abs()

        class Tamper(nmbench.Metric):
            def measure(self, subject, dense):
                if dense.cached:
                    next(iter(subject.bundle.layers.values())).read().CHANGE
                subject.cached["x@1"] = torch.zeros(3, dtype=torch.float64)
                return {"tamper": nmbench.Value(1.0, 1)}

        @nmbench.hookimpl
        def nmbench_register_metrics(register):
            register("tamper", Tamper)
        """.replace("CHANGE", change),
    )
    flags = [flag for flag in small[: small.index("--set")] if not flag.startswith("ppl:")]
    flags[flags.index("--metric") + 1 : flags.index("--metric") + 1] = ["tamper"]
    result = nmbench("run", *flags, "--plugin", path, "--method", "magnitude", "--out", "out")
    assert result.exit_code == 1
    rows = {row["label"]: row for row in records(tmp_path / "out")}
    assert rows["magnitude"]["status"] == "failed"
    assert "changed while they were measured" in rows["magnitude"]["error"]
    assert rows["magnitude"]["metrics"] == {}


MAGNITUDE = """
@dataclass(frozen=True)
class Mine(nmbench.Scorer):
    def score(self, weight, stats):
        return weight.abs()
"""


def test_a_metric_may_compare_with_the_dense_model(nmbench, small, records, tmp_path):
    """`dense` has the dense model's losses for every row, the dense one included, where they are its own."""
    path = plugin(
        tmp_path,
        MAGNITUDE
        + textwrap.dedent("""
        @dataclass(frozen=True)
        class Ratio(nmbench.Metric):
            @property
            def datasets(self):
                return (self.argument,)

            def measure(self, subject, dense):
                value = float((subject.losses(self.argument, 64) / dense.losses(self.argument, 64)).mean())
                return {"ratio": nmbench.Value(value, 1)}

        @nmbench.hookimpl
        def nmbench_register_metrics(register):
            register("ratio", Ratio)
        """),
    )
    flags = [flag.replace("ppl:", "ratio:").removesuffix("@64") for flag in small[: small.index("--set")]]
    result = nmbench("run", *flags, "--plugin", path, "--method", "mine", "--out", "out")
    assert result.exit_code == 0, result.output
    dense, mine = (row["metrics"]["ratio"]["value"] for row in records(tmp_path / "out"))
    assert dense == 1
    assert mine != 1


def test_a_method_leaves_no_trace_on_the_model(nmbench, small, records, tmp_path):
    """Training mode, hooks, gradients and precision that a careless method leaves behind do not reach the next row."""
    path = plugin(
        tmp_path,
        MAGNITUDE
        + textwrap.dedent("""
        @dataclass(frozen=True)
        class Careless(nmbench.MaskLearner):
            def learn(self, task):
                task.model.train().requires_grad_(True)
                for module in task.model.modules():
                    module.register_forward_hook(lambda module, args, output: None)
                    if isinstance(module, torch.nn.LayerNorm):
                        module.register_forward_hook(lambda module, args, output: output * 0)
                torch.set_default_dtype(torch.float64)
                torch.set_float32_matmul_precision("medium")
                return task.initial

        @nmbench.hookimpl
        def nmbench_register_mask_learners(register):
            register("careless", Careless)
        """),
    )
    flags = [flag.replace("tiny:llama", "tiny:gpt2") for flag in small[: small.index("--set")]]
    assert nmbench("run", *flags, "--method", "wanda", "--out", "alone").exit_code == 0
    methods = ["--plugin", path, "--method", "careless", "--method", "wanda", "--out", "out"]
    result = nmbench("run", *flags, *methods)
    assert result.exit_code == 0, result.output
    alone = {row["label"]: row for row in records(tmp_path / "alone")}
    rows = {row["label"]: row for row in records(tmp_path / "out")}
    assert rows["wanda"]["metrics"] == rows["careless@init"]["metrics"] == alone["wanda"]["metrics"]
    assert rows["careless"]["metrics"] == rows["careless@init"]["metrics"]


def test_a_file_that_cannot_be_imported_is_listed(nmbench, tmp_path):
    """`nmbench plugins` lists the file with its failure, where other commands stop."""
    path = tmp_path / "broken.py"
    path.write_text("import no_such_module\n")
    listed = nmbench("plugins", "--plugin", path)
    assert listed.exit_code == 1
    assert "FAILED at import: ModuleNotFoundError: No module named 'no_such_module'" in listed.output
    assert nmbench("methods", "--plugin", path).exit_code == 1


def test_a_file_replaces_an_installed_method(nmbench, small, tmp_path, records):
    """The method of the file that the user names runs instead of the installed one, and a warning says so."""
    path = plugin(
        tmp_path, "class Mine(nmbench.Scorer):\n    def score(self, weight, stats):\n        return -weight.abs()\n"
    )
    path.write_text(path.read_text().replace('"mine"', '"magnitude"'))
    flags = [*small[: small.index("--set")], "--method", "magnitude"]
    result = nmbench("run", *flags, "--plugin", path, "--out", "mine")
    assert result.exit_code == 0, result.output
    assert f"WARNING method 'magnitude' of file {path} replaces that of nmbench" in result.stderr
    assert nmbench("run", *flags, "--out", "theirs").exit_code == 0
    mine, theirs = (records(tmp_path / name)[1] for name in ("mine", "theirs"))
    assert mine["proof"]["masks_digest"] != theirs["proof"]["masks_digest"]
    assert mine["content"]  # the digest of the file


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
