"""The script that measures signal and noise of MaskPro's estimator: its gradient, its variances, one small run."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from nmbench import NMBenchError, Pattern
from nmbench_plugins.demo import DemoPlays
from nmbench_plugins.maskpro import policy
from reference.run_directory import write_run

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "maskpro_noise.py"


@pytest.fixture
def noise(monkeypatch):
    """The script, as a module."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("maskpro_noise", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "maskpro_noise", module)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("finished_rows", None)


class Policy:
    """Logits of one pattern, where the script reads those of a learner."""

    def __init__(self, pattern, flat):
        self.flat = {pattern: flat}


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(3, 5)], ids=str)
def test_the_gradient_is_that_of_the_expected_effect(noise, pattern):
    """The gradient equals the difference quotient of the expected effect of a draw."""
    generator = torch.Generator().manual_seed(0)
    logits, effects = (torch.randn(3, pattern.group, generator=generator, dtype=torch.float64) for _ in range(2))
    kept = policy.greedy(logits, pattern.keep).double()
    found = noise.gradient(Policy(pattern, logits), {pattern: effects}, {pattern: kept})[pattern]

    def expected(moved):
        total = 0.0
        for chosen in itertools.combinations(range(pattern.group), pattern.keep):
            mask = torch.zeros(moved.shape, dtype=torch.bool)
            mask[:, list(chosen)] = True
            total += (policy.log_prob(moved, mask).exp() * (effects * mask).sum(-1)).sum()
        return total

    for row, column in itertools.product(range(3), range(pattern.group)):
        step = torch.zeros_like(logits)
        step[row, column] = 1e-5
        quotient = (expected(logits + step) - expected(logits - step)) / 2e-5
        assert float(found[row, column]) == pytest.approx(float(quotient), abs=1e-7)


def test_the_parts_of_the_variance(noise):
    """The parts of a table with known parts, and those of a minibatch: more windows leave the part of the masks."""
    normal = torch.Generator().manual_seed(1)
    masks, windows, both = (torch.randn(*size, generator=normal).double() for size in ((600, 1), (1, 600), (600, 600)))
    found = noise.components(3 * masks + 2 * windows + both)
    assert found == {name: pytest.approx(value, rel=0.15) for name, value in (("mask", 9), ("window", 4), ("both", 1))}
    exact = {"mask": 9.0, "window": 4.0, "both": 1.0}
    assert noise.parts_of_variance(exact, 5) == {"size": 5, "variance": 10, "same_windows": 9.2, "same_mask": 1}


def test_the_script_runs_on_a_tiny_model(noise, monkeypatch, tmp_path, capsys):
    """From a mask that the script makes: a line for it, a cosine after every number of steps, effects that add up."""

    def text_of(split, length):
        (tmp_path / split).write_text(next(iter(DemoPlays().texts(split)))[:length], encoding="utf-8")
        return tmp_path / split

    (tmp_path / "run.toml").write_text(
        f'calibration = "text:{text_of("calibration", 20_000)}"\nmetrics = ["ppl:text:{text_of("test", 1500)}@32"]\n'
        "windows = 2\nwindow_tokens = 32\npool_tokens = 1024\nselection_tokens = 256\n"
    )
    flags = ["--model", "tiny:llama", "--config", str(tmp_path / "run.toml"), "--start", "magnitude", "--truth", "16"]
    flags += ["--grid", "6", "8", "--steps", "1", "4", "--out", str(tmp_path / "starts"), "--json"]
    monkeypatch.setattr(sys, "argv", ["maskpro_noise.py", *flags, str(tmp_path / "figures.json")])
    noise.main()
    (row,) = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert row["start"] == "starts:magnitude:2:4:0" and row["minibatch"]["size"] == 8
    assert [one["steps"] for one in row["cosine"]] == [1, 4] and all(abs(one["cosine"]) < 1 for one in row["cosine"])
    assert row["grid"]["first_order_correlation"] > 0.9 and row["change_without_noise"] < 0
    assert row["gradient"]["norm"] < row["estimate_norm"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("| starts:magnitude:2:4:0 |")


def test_a_row_without_a_mask_is_refused(noise, tmp_path):
    """An address that names no row of a run directory is an error of one line."""
    path = write_run(tmp_path / "a", [])
    with pytest.raises(NMBenchError, match="no row"):
        noise.opened(f"{path}:wanda:2:4:0", "cpu")
