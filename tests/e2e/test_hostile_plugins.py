"""Plugins that do what they must not: it costs their own row at most, and no other number changes by a bit."""

from __future__ import annotations

import contextlib
import json
import signal
import textwrap

import pytest

SHELLS = {
    "scorer": """
    def score(self, weight, stats):
        BODY
        return weight.abs()
""",
    "solver": """
    def solve(self, weight, stats, pattern):
        mask = pattern.top(weight.abs())
        BODY
        return nmbench.Pruned(mask)
""",
    "learner": """
    def learn(self, task):
        masks = dict(task.initial)
        first = next(iter(masks))
        BODY
        return masks
""",
}
BASES = {"scorer": "Scorer", "solver": "Solver", "learner": "MaskLearner"}
HARMLESS = {  # what is undone or fenced off; the method's own row is fine
    "moves the random state": ("scorer", "torch.manual_seed(1); numpy.random.seed(1); random.seed(1)"),
    "changes the dtype": ("scorer", "torch.set_default_dtype(torch.float64)"),
    "changes the threads": ("scorer", "torch.set_num_threads(1 + torch.get_num_threads())"),
    "asks for determinism": ("scorer", "torch.use_deterministic_algorithms(True); torch.set_grad_enabled(True)"),
    "changes the folder": ("scorer", "os.chdir('/')"),
    "prints": ("scorer", "print('noise')"),
    "writes into what it is lent": ("scorer", "weight.zero_(); stats.input_norm.zero_()"),
    "writes into the statistics": ("solver", "stats.gram.fill_(7); weight.fill_(3)"),
    "writes into the live weights": ("learner", "task.bundle.layers[first].read().fill_(3)"),
    "writes into all parameters": ("learner", "[p.data.fill_(1) for p in task.model.parameters()]"),
    "writes into its tokens": ("learner", "task.pool.zero_(); task.selection.zero_()"),
    "draws from its generator": ("learner", "torch.rand(9, generator=task.generator); next(task.batches(2))"),
}
HARMFUL = {  # what costs the method its row, and words of the reason
    "mask on another device": ("solver", "mask = mask.to('meta')", "on meta"),
    "mask of another dtype": ("learner", "masks[first] = masks[first].float()", "instead of torch.bool"),
    "mask of another shape": ("learner", "masks[first] = masks[first][:-1]", "mask of shape"),
    "mask with a weight too many": ("learner", "masks[first][0, :4] = True", "keep 4 instead of 2"),
    "no mask for a layer": ("learner", "masks.pop(first)", "no mask for 1 of"),
    "no masks at all": ("learner", "return None", "returned NoneType"),
    "no Pruned at all": ("solver", "return mask", "returned Tensor instead of nmbench.Pruned"),
    "no scores at all": ("scorer", "return None", "returned NoneType instead of scores"),
    "loose mask reported": ("learner", "task.report(3, masks={n: m | True for n, m in masks.items()})", "broke 2:4"),
    "writes into the dense weights": ("learner", "task.dense[first].mul_(2)", "changed the model"),
    "casts the model": ("learner", "task.model.half()", "changed the model"),
    "patches the model": ("learner", "task.model.lm_head.forward = lambda x: x.repeat(1, 1, 9)", "changed the model"),
    "breaks the model": ("learner", "task.model.forward = None", "changed the model"),
    "takes a layer away": ("learner", "task.bundle.layers.pop(first)", "changed the model"),
    "raises": ("learner", "raise ValueError('no idea')", "ValueError: no idea"),
    "exits": ("learner", "raise SystemExit(0)", "SystemExit"),
}
HOSTILE = {**{name: (*what, None) for name, what in HARMLESS.items()}, **HARMFUL}


def method_of(what: str) -> str:
    return what.replace(" ", "-").lower()


def source() -> str:
    """A plugin with a method for every entry of HOSTILE."""
    parts = ["import os, random", "from dataclasses import dataclass", "import numpy, torch", "import nmbench", ""]
    hooks: dict[str, list[str]] = {"baselines": [], "mask_learners": []}
    for number, (what, (kind, body, _)) in enumerate(HOSTILE.items()):
        needs = (
            "" if kind == "learner" else f"\n    needs = nmbench.Stat.{'GRAM' if kind == 'solver' else 'INPUT_NORM'}"
        )
        head = f"@dataclass(frozen=True)\nclass M{number}(nmbench.{BASES[kind]}):{needs}"
        parts.append(head + SHELLS[kind].replace("BODY", body))
        hook = "mask_learners" if kind == "learner" else "baselines"
        hooks[hook].append(f"    register({method_of(what)!r}, M{number})")
    for hook, lines in hooks.items():
        parts += ["@nmbench.hookimpl", f"def nmbench_register_{hook}(register):", *lines]
    return "\n".join(parts) + "\n"


@pytest.fixture(scope="module")
def rows(texts, tmp_path_factory):
    """One run in which every hostile method is followed by a good one, as rows by label; and what was printed."""
    from click.testing import CliRunner

    from nmbench.cli import main

    folder = tmp_path_factory.mktemp("hostile")
    (folder / "hostile.py").write_text(source())
    flags = ["--model", "tiny:llama", "--calibration", f"text:{texts}/cal.txt"]
    flags += ["--metric", f"ppl:text:{texts}/test.txt@64"]
    flags += ["--windows", "4", "--window-tokens", "64", "--pool-tokens", "2048", "--selection-tokens", "1024"]
    flags += ["--plugin", "hostile.py", "--out", "out", "--method", "before=wanda", "--method", "gram=sparsegpt"]
    for what in HOSTILE:
        flags += ["--method", method_of(what), "--method", f"after-{method_of(what)}=wanda"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = CliRunner().invoke(main, ["run", *flags, "--method", "gram-after=sparsegpt"])
    found = [json.loads(line) for line in (folder / "out/records.jsonl").read_text().splitlines()]
    return {row["label"]: row for row in found}, result, folder / "out"


def numbers(row):
    """The numbers of a row that no other method may change."""
    return [row[key] for key in ("status", "metrics", "proof", "against_dense", "calibration_digest", "cost")]


@pytest.mark.parametrize("what", HOSTILE)
def test_others_are_not_touched(rows, what):
    """The method that comes next has the numbers that it had before, to the last bit."""
    found, result, _ = rows
    assert numbers(found[f"after-{method_of(what)}"]) == numbers(found["before"]), result.output


def test_nor_by_all_of_them(rows):
    """A method that needs other statistics has the same numbers before and after all of them."""
    assert numbers(rows[0]["gram-after"]) == numbers(rows[0]["gram"])


@pytest.mark.parametrize("what", HARMLESS)
def test_what_is_undone(rows, what):
    """It is undone or fenced off: the method's own row is fine."""
    assert rows[0][method_of(what)]["status"] == "ok", rows[0][method_of(what)]["error"]


@pytest.mark.parametrize("what", HARMFUL)
def test_what_costs_the_row(rows, what):
    """Its row fails with the reason and a traceback file, and has no numbers."""
    found, _, out = rows
    row, words = found[method_of(what)], HARMFUL[what][2]
    assert row["status"] == "failed"
    assert words in row["error"], row["error"]
    assert row["metrics"] == {}
    assert (out / row["traceback"]).read_text().startswith("Traceback")


def test_what_the_user_sees(rows):
    """The exit status says that something failed, and standard output holds the table alone."""
    _, result, _ = rows
    assert result.exit_code == 1
    assert result.stdout.count("FAILED") >= len(HARMFUL)
    assert "noise" not in result.stdout
    assert "noise" in result.stderr


TAMPERING = """
import nmbench, torch

class Tamper(nmbench.Metric):
    def measure(self, subject, dense):
        for tokens in subject.texts.values():
            tokens.zero_()
        for losses in dense.cached.values():
            losses.zero_()
        return {"tamper": nmbench.Value(1.0, 1)}

@nmbench.hookimpl
def nmbench_register_metrics(register):
    register("tamper", Tamper)
"""


def test_a_metric_is_lent_copies(nmbench, finished, small, records, tmp_path):
    """A metric that writes into texts and dense losses spoils no later row."""
    (tmp_path / "tamper.py").write_text(TAMPERING)
    flags = [*small[: small.index("--set")], "--method", "magnitude", "--method", "wanda"]
    finished(*flags, "--out", "quiet")
    result = nmbench("run", *flags, "--metric", "tamper", "--plugin", "tamper.py", "--out", "out")
    assert result.exit_code == 0, result.output
    quiet = {row["label"]: row for row in records(tmp_path / "quiet")}
    for row in records(tmp_path / "out"):
        ppl = {name: value for name, value in row["metrics"].items() if name != "tamper"}
        assert ppl == quiet[row["label"]]["metrics"]
        assert row["against_dense"] == quiet[row["label"]]["against_dense"]


ENDLESS = """
import signal, threading, time, nmbench
from dataclasses import dataclass

@dataclass(frozen=True)
class Endless(nmbench.MaskLearner):
    \"\"\"Never ends.\"\"\"
    def learn(self, task):
        threading.Timer(0.1, signal.raise_signal, [signal.SIGINT]).start()  # Ctrl-C, while it sleeps
        while True:
            time.sleep(0.01)

@nmbench.hookimpl
def nmbench_register_mask_learners(register):
    register("endless", Endless)
"""


def test_a_learner_that_never_ends(nmbench, small, records, tmp_path):
    """Ctrl-C ends it with status 130 and one line; what was finished is kept, and the run goes on without it."""
    (tmp_path / "endless.py").write_text(ENDLESS)
    flags = [*small[: small.index("--set")], "--method", "magnitude", "--out", "out"]
    with listening_to_ctrl_c():
        result = nmbench("run", *flags, "--plugin", "endless.py", "--method", "endless")
    assert result.exit_code == 130
    assert "The same command goes on" in result.stderr
    assert "Traceback" not in result.stderr
    done = records(tmp_path / "out")
    assert [row["label"] for row in done] == ["dense", "magnitude", "endless@init"]
    assert nmbench("run", *flags, "--method", "wanda").exit_code == 0
    assert records(tmp_path / "out")[: len(done)] == done


@contextlib.contextmanager
def listening_to_ctrl_c():
    """Let Ctrl-C through, also where the tests run in the background, deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_option_that_hides_something(nmbench, small, tmp_path):
    """A plugin whose option takes a word of nmbench is refused when it is loaded, by `run` and by `plugins`."""
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        from dataclasses import dataclass
        import nmbench
        @dataclass(frozen=True)
        class Mine(nmbench.Scorer):
            needs: int = nmbench.option(3, "what I need")
        @nmbench.hookimpl
        def nmbench_register_baselines(register):
            register("mine", Mine)
        """)
    )
    listed = nmbench("plugins", "--plugin", "mine.py")
    assert listed.exit_code == 1
    assert "FAILED at register: option 'needs' of 'mine' has a name that nmbench reserves" in listed.output
    result = nmbench("run", *small[:-2], "--plugin", "mine.py", "--method", "mine", "--out", "out")
    assert result.exit_code == 1
    assert "option 'needs' of 'mine' has a name that nmbench reserves" in result.stderr
