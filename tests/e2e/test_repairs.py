"""Repairs from the command line: every start, several starts, cost, proof, confirmation, kept weights, kills."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import nmbench as nm
from nmbench.results.kept_weights import load_weights
from reference import repairs

FILE = repairs.__file__
PLUGIN = ("--plugin", FILE, "--quiet", "--out", "out")
OWN = 3 * 4 * 64 // 2  # tokens of a walk through two blocks, the first of them twice
CONFIRMED = 2 * 8 * 64  # tokens of the comparison with the start


@pytest.fixture(scope="session")
def tiny(small):
    """Flags of a tiny random model, without a method."""
    return [*small[: small.index("--set")], *PLUGIN]


@pytest.fixture(scope="session")
def demo(tiny):
    """Flags of the demo on the texts of the tiny model."""
    return [*("demo" if flag == "tiny:llama" else flag for flag in tiny), "--pool-tokens", "512"]


TRAINED = [
    *("--method", "near=nearer", "--set", "near.init=wanda,magnitude", "--set", "near.steps=3"),
    *("--method", "tune", "--set", "tune.init=magnitude", "--set", "tune.rate=1e-4", "--set", "tune.steps=3"),
    *("--method", "worse=broken-layers", "--set", "worse.how=worse", "--set", "worse.init=magnitude"),
]


@pytest.fixture
def trained(finished, demo, records, tmp_path):
    """Repairs of a trained model: the result of the command, and the records by label."""
    result = finished(*demo, *TRAINED)
    return result, by_label(records(tmp_path / "out"))


def by_label(rows):
    return {row["label"]: row for row in rows}


def forward(row):
    return row["cost"]["forward_tokens"]


def weights_of(folder: Path, label: str) -> dict[str, torch.Tensor]:
    """The kept weights of a row, layer name -> `[out, in]`."""
    masks = nm.load_masks(folder / "masks" / f"{label}--2-4--seed0.safetensors")
    return load_weights(folder / "weights" / f"{label}--2-4--seed0.safetensors", masks)[0]


# Starts


def test_any_row_is_a_start(nmbench, finished, small, tiny, records, tmp_path):
    """One-shot methods, refiners, solvers, learners, imports and repaired rows are starts; each gives a row of its own
    with its mask, its whole cost and its label.
    """
    finished(*small)
    masks = (tmp_path / "out/masks/maskpro--2-4--seed0.safetensors").rename(tmp_path / "given.safetensors")
    flags = [
        *("--method", "solved=sparsegpt", "--method", "given=import", "--set", f"given.path={masks}"),
        *("--method", "learnt=maskpro", "--set", "learnt.steps=2", "--method", "first=rescale"),
        *("--method", "fixed=rescale", "--set", "fixed.init=magnitude,swaps,solved,learnt,given,first"),
    ]
    result = nmbench("run", *tiny, *flags, "--out", "starts")
    assert result.exit_code == 0, result.output
    rows = by_label(records(tmp_path / "starts"))
    starts = ("magnitude", "swaps", "solved", "learnt", "given", "first")
    assert [label for label in rows if label.startswith("fixed")] == [f"fixed@{start}" for start in starts]
    assert rows["first"]["started_from"] == "wanda"
    for start in starts:
        row = rows[f"fixed@{start}"]
        assert row["status"] == "ok" and row["strict"], row.get("error")
        assert (row["started_from"], row["repairs"], row["options"]["init"]) == (start, "fixed", start)
        assert row["proof"]["masks_digest"] == rows[start]["proof"]["masks_digest"]
        if start == "given":
            assert forward(row) is forward(rows[start]) is None  # nobody knows what imported masks took
        else:
            assert forward(row) == forward(rows[start]) + OWN + CONFIRMED
            assert row["seconds"]["prune"] >= rows[start]["seconds"]["prune"]
    kept = {path.name.partition("--")[0] for path in (tmp_path / "starts/weights").iterdir()}
    assert {"solved"} <= kept <= {"solved", "first", *(f"fixed@{start}" for start in starts)}
    assert all(rows[label]["kept_bytes"] for label in kept)


def test_starts_are_ranked_under_their_repair(trained):
    """A repair of several rows says whether they still differ after it, with an interval; what each gained is told."""
    result, rows = trained
    assert {"near@wanda", "near@magnitude", "wanda", "magnitude"} <= set(rows)
    assert "after near, by start: " in result.output
    assert "near@wanda against its start wanda -" in result.output
    assert "near@magnitude against its start magnitude -" in result.output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["fixed.init=nobody"], "'nobody' is neither"),
        (["fixed.init=maskpro"], "'maskpro' is neither"),
        (["fixed.init=fixed"], "'fixed' is neither"),
    ],
)
def test_what_is_no_start(nmbench, tiny, flags, message):
    """An unknown name, a learner that is not in the command and the row itself are refused in one line."""
    result = nmbench("run", *tiny, "--method", "fixed=rescale", *(f for flag in flags for f in ("--set", flag)))
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_start_that_failed(nmbench, tiny):
    """The repair of a row that failed is a failed row, which says so."""
    flags = ["--method", "first=broken-layers", "--method", "fixed=rescale", "--set", "fixed.init=first"]
    result = nmbench("run", *tiny, *flags)
    assert result.exit_code == 1
    assert "fixed has nothing to begin with, because first failed." in result.stdout


def test_too_few_selection_windows(nmbench, tiny):
    """Without windows to compare a repair with its start, the row fails before any work."""
    result = nmbench("run", *tiny, "--method", "fixed=rescale", "--selection-tokens", "192")
    assert result.exit_code == 1
    assert "fixed needs at least 4 selection windows; raise --selection-tokens." in result.stdout


# Proof


BROKEN = [(kind, how) for kind in ("layers", "blocks", "model") for how in repairs.BREAKS[:-1]]
BROKEN.remove(("blocks", "mask"))  # a block repair returns no masks


@pytest.fixture
def broken(nmbench, made, tiny):
    """The output of a run of all broken repairs."""
    flags = [
        flag
        for number, (kind, how) in enumerate(BROKEN)
        for flag in ("--method", f"m{number}=broken-{kind}", "--set", f"m{number}.how={how}")
    ]
    return made(nmbench, (*tiny, *flags))


@pytest.mark.parametrize(("kind", "how"), BROKEN)
def test_a_broken_repair_has_no_number(broken, records, kind, how):
    """Another mask, weights off the mask, NaN, -0.0 and other shapes fail the row in one line that names the layer."""
    result, folder = broken
    assert result.exit_code == 1
    label = f"m{BROKEN.index((kind, how))}"
    row = by_label(records(folder / "out"))[label]
    assert (row["status"], row["metrics"], row["kept_bytes"]) == ("failed", {}, None)
    says = {
        "mask": "changed the mask of",
        "off the mask": "non-zero weights off the mask",
        "nan": "NaN or infinite weights",
        "negative zero": "negative zeros off the mask",
        "shape": "of shape",
    }
    assert says[how] in row["error"]
    assert row["error"].startswith(label) and "\n" not in row["error"]
    assert not (folder / f"out/weights/{label}--2-4--seed0.safetensors").exists()


# Confirmation


def test_a_repair_is_never_worse_than_its_start(trained):
    """Where unseen windows do not confirm a repair, the row has the figures of its start, and the table says so."""
    result, rows = trained
    worse, start = rows["worse"], rows["magnitude"]
    for name in ("metrics", "measured_digest", "weights_changed"):
        assert worse[name] == start[name]
    assert worse["notes"]["confirmation"]["holds"] is False
    assert worse["kept_bytes"] is None
    note = next(line for line in result.output.splitlines() if line.startswith("NOTE worse 2:4 seed 0: "))
    assert "8 unseen selection windows do not confirm that the repair is better than its start magnitude (+" in note


def test_better_repairs_are_confirmed(trained):
    """Block repair and weight learner lower the loss of a trained model, on unseen windows and on the test text."""
    _, rows = trained
    for label in ("near@wanda", "near@magnitude", "tune"):
        row, start = rows[label], rows[rows[label]["started_from"]]
        assert row["notes"]["confirmation"]["holds"] is True
        (metric,) = row["metrics"]
        assert row["metrics"][metric]["value"] < start["metrics"][metric]["value"]
        assert row["cost"]["backward_tokens"] > 0
        assert row["weights_changed"]
        assert row["curve"]


# Kept weights


def test_weights_are_kept_and_their_size_is_said(trained, tmp_path):
    """The run directory holds the repaired weights, and the output says how much that is."""
    result, rows = trained
    files = {path.name.partition("--")[0]: path.stat().st_size for path in (tmp_path / "out/weights").iterdir()}
    assert files == {label: rows[label]["kept_bytes"] for label in ("near@wanda", "near@magnitude", "tune")}
    size = sum(files.values()) / 2**20
    assert (
        f"NOTE weights/ holds the repaired weights of 3 rows, {size:.1f} MiB; with --no-keep-weights" in result.output
    )
    assert "masks, weights, losses" in result.output


@pytest.mark.parametrize("label", ["near@magnitude", "tune", "worse"])
def test_an_exported_repair_is_what_was_measured(trained, nmbench, tmp_path, monkeypatch, label):
    """`export` writes the kept weights without repairing again; the checkpoint is strict and reads back the same."""
    monkeypatch.setattr("nmbench.artifacts.rebuilding.made", None)
    result = nmbench("export", "out", label, "--to", "model")
    assert result.exit_code == 0, result.output
    assert nmbench("validate", "model").exit_code == 0
    exported = load_file(tmp_path / "model/model.safetensors")
    masks = nm.load_masks(tmp_path / f"out/masks/{label}--2-4--seed0.safetensors")
    assert all(not exported[f"{name}.weight"][~mask].count_nonzero() for name, mask in masks.items())
    if label != "worse":
        kept = weights_of(tmp_path / "out", label)
        assert set(kept) == set(masks)
        assert all(torch.equal(exported[f"{name}.weight"], weight) for name, weight in kept.items())


def test_weights_that_were_not_kept_are_made_again(trained, nmbench, demo, records, tmp_path):
    """With --no-keep-weights the same row has no file of weights; an export repairs again, and leaves no trace."""
    _, rows = trained
    repair = ["--method", "near=nearer", "--set", "near.init=magnitude", "--set", "near.steps=3"]
    flags = [*demo, *repair, "--no-keep-weights", "--out", "light"]
    result = nmbench("run", *flags)
    assert result.exit_code == 0, result.output
    light = by_label(records(tmp_path / "light"))
    assert "repaired weights of" not in result.output
    assert not (tmp_path / "light/weights").exists()
    assert light["near"]["measured_digest"] == rows["near@magnitude"]["measured_digest"]
    assert light["near"]["cost"] == rows["near@magnitude"]["cost"]
    assert light["near"]["kept_bytes"] is None
    assert nmbench("export", "light", "near", "--to", "again").exit_code == 0
    exported, kept = load_file(tmp_path / "again/model.safetensors"), weights_of(tmp_path / "out", "near@magnitude")
    assert all(torch.equal(exported[f"{name}.weight"], weight) for name, weight in kept.items())
    assert not list(tmp_path.glob("light/checkpoints/*.safetensors"))


def test_a_copied_row_claims_no_weights(nmbench, tiny, records, tmp_path):
    """The copy of a row whose weights are kept has no file of weights, and its record says so."""
    flags = ["--method", "sparsegpt", "--method", "same=sparsegpt", "--method", "fixed=rescale"]
    result = nmbench("run", *tiny, *flags, "--set", "fixed.init=sparsegpt,same")
    assert result.exit_code == 0, result.output
    rows = by_label(records(tmp_path / "out"))
    assert rows["sparsegpt"]["kept_bytes"]
    assert (rows["same"]["copied_from"], rows["same"]["kept_bytes"]) == ("sparsegpt", None)
    assert rows["fixed@same"]["measured_digest"] == rows["fixed@sparsegpt"]["measured_digest"]


# Kills


@pytest.mark.parametrize(
    ("method", "stage"),
    [("nearer", "repair 1"), ("nearer", "block 2 of 2 3"), ("tune", "learn 3")],
)
def test_a_killed_repair_ends_like_one_that_was_not(nmbench, python, finished, tiny, records, tmp_path, method, stage):
    """Killed after a block, inside a block or between two checkpoints: the same weights, figures and cost."""
    flags = [*tiny, "--method", method, "--set", f"{method}.steps=4"]
    environment = {**os.environ, repairs.KILLS: stage}
    killed = python.run("-m", "nmbench.cli", "run", *map(str, flags), env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [row["label"] for row in records(tmp_path / "out")] == ["dense", "wanda"]
    assert list(tmp_path.glob("out/checkpoints/*.safetensors"))
    assert nmbench("run", *flags).exit_code == 0
    assert not list(tmp_path.glob("out/checkpoints/*.safetensors"))
    finished(*(flag if flag != "out" else "whole" for flag in flags))
    resumed, straight = (by_label(records(tmp_path / out))[method] for out in ("out", "whole"))
    for name in ("measured_digest", "metrics", "curve", "notes"):
        assert resumed[name] == straight[name]
    if method != "tune":  # steps after the last checkpoint were done twice
        assert resumed["cost"] == straight["cost"]
