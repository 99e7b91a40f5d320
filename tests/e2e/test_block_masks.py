"""Masks that are learnt block by block, from the command line: streamed, killed, and on the demo."""

from __future__ import annotations

import os
import signal

import pytest

import nmbench as nm
from reference import repairs

BLOCKS = ("--method", "soft", "--set", "soft.scope=block", "--set", "soft.init=wanda", "--set", "soft.passes=2")
RECORDED = ("masks_digest", "metrics", "curve", "notes", "cost")


@pytest.fixture
def tiny(small):
    """Flags of a tiny random model, without a method."""
    return [*small[: small.index("--set")], "--plugin", repairs.__file__, "--quiet", "--pool-tokens", "1024"]


def row(records, folder):
    """What must not differ in the record of soft."""
    (record,) = [record for record in records(folder) if record["label"] == "soft"]
    assert record["status"] == "ok" and record["strict"], record.get("error")
    return {**{name: record[name] for name in RECORDED[1:]}, "masks": record["proof"]["masks_digest"]}


def test_streamed_or_killed_the_row_is_the_same(nmbench, finished, python, tiny, records, tmp_path):
    """With blocks on the host, and after a kill inside the second block, masks, figures and cost are the same."""
    finished(*tiny, *BLOCKS, "--out", "whole")
    finished(*tiny, *BLOCKS, "--out", "streamed", "--stream")
    killed = ["run", *tiny, *BLOCKS, "--out", "killed"]
    environment = {**os.environ, repairs.KILLS: "block 2 of 2 3"}
    assert python.run("-m", "nmbench.cli", *map(str, killed), env=environment).returncode == -signal.SIGKILL
    assert list(tmp_path.glob("killed/checkpoints/*.safetensors"))
    assert nmbench(*killed).exit_code == 0
    whole = row(records, tmp_path / "whole")
    assert row(records, tmp_path / "streamed") == whole
    assert row(records, tmp_path / "killed") == whole
    assert [point["step"] for point in whole["curve"]] == [1, 2]
    assert all(point["error_after"] <= point["error_before"] for point in whole["curve"])
    assert not list(tmp_path.glob("*/checkpoints/*.safetensors"))


def test_a_learner_of_the_whole_model_cannot_stream(nmbench, tiny):
    """With `scope=model`, --stream is refused in one line."""
    result = nmbench("run", *tiny, "--method", "soft", "--stream", "--out", "out")
    assert result.exit_code == 1
    assert "a learner of the whole model needs it on the device" in result.stderr


@pytest.mark.slow
def test_the_demo_in_short(finished, tiny, records, tmp_path):
    """On the demo, every block has a point of the curve, and masks are strict."""
    demo = ["demo" if flag == "tiny:llama" else flag for flag in tiny]
    finished(*demo, *BLOCKS, "--pattern", "1:4", "--out", "out")
    found = row(records, tmp_path / "out")
    assert [point["step"] for point in found["curve"]] == [1, 2, 3, 4]
    assert all(point["error_after"] <= point["error_before"] for point in found["curve"])
    for mask in nm.load_masks(tmp_path / "out/masks/soft--1-4--seed0.safetensors").values():
        assert (mask.view(len(mask), -1, 4).sum(-1) == 1).all()
