"""The embedded demo through the command line: quickly in the fast tier, with full settings in the slow one."""

from __future__ import annotations

import pytest
import torch

from nmbench.comparison import paired
from nmbench.results.files import read_tensors
from nmbench_plugins.demo import DemoPlays

QUICK = [
    *("--windows", "4", "--window-tokens", "64", "--pool-tokens", "1024", "--selection-tokens", "512"),
    *("--set", "maskpro.steps=3"),
]


def losses(directory, label):
    """Per-window test losses of a row."""
    name = label if label == "dense" else f"{label}--2-4--seed0"
    return read_tensors(directory / "losses" / f"{name}.safetensors")[0]["demo@256"]


def beginnings(plays, split, texts=DemoPlays.texts):
    """The texts of the demo, cut short."""
    return (text[:20_000] for text in texts(plays, split))


def test_the_demo_in_short(nmbench, texts, records, tmp_path, monkeypatch):
    """With little text and few steps the demo runs through without a doubt; its dense perplexity is that of a trained
    model.
    """
    monkeypatch.setattr(DemoPlays, "texts", beginnings)
    metric = f"ppl:text:{texts}/test.txt@256"
    result = nmbench("run", "--method", "maskpro", "--method", "wanda", *QUICK, "--metric", metric, "--out", "out")
    assert result.exit_code == 0, result.output
    rows = {row["label"]: row for row in records(tmp_path / "out")}
    assert list(rows) == ["dense", "maskpro@init", "maskpro", "wanda"]
    dense = rows["dense"]["metrics"][metric]
    assert 30 < dense["value"] < 45
    assert rows["wanda"]["metrics"][metric]["value"] > 1.5 * dense["value"]
    assert rows["wanda"]["coverage"]["share_of_decoder"] > 0.99
    assert "DOUBT" not in result.output
    assert {(*row["doubts"], *row["unranked"]) for row in rows.values()} == {()}


@pytest.mark.slow
def test_the_order_of_the_methods(nmbench, records, tmp_path):
    """At 2:4 with default settings: dense < swaps < SparseGPT < Wanda < magnitude, and MaskPro is below its start."""
    methods = [flag for name in ("magnitude", "wanda", "sparsegpt", "swaps", "maskpro") for flag in ("--method", name)]
    result = nmbench("run", *methods, "--out", "out")
    assert result.exit_code == 0, result.output
    assert 30 < records(tmp_path / "out")[0]["metrics"]["ppl:demo@256"]["value"] < 45
    found = {label: losses(tmp_path / "out", label) for label in ("dense", "swaps", "sparsegpt", "wanda", "magnitude")}
    for better, worse in zip(list(found)[:-1], list(found)[1:], strict=True):
        assert paired(found[better], found[worse]).high < 0, (better, worse)
    gain = paired(losses(tmp_path / "out", "maskpro"), losses(tmp_path / "out", "maskpro@init"))
    assert gain.high < 0, gain
    assert torch.equal(losses(tmp_path / "out", "maskpro@init"), found["wanda"])
