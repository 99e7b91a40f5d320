"""`--calibration self:DATA` through the command line: rows, report and protocol say what the text is and cost."""

from __future__ import annotations

import json

import pytest

from nmbench.results.files import read_tensors


@pytest.fixture
def flags(texts):
    return [
        *("--model", "tiny:llama", "--method", "wanda", "--metric", f"ppl:text:{texts}/test.txt@64"),
        *("--calibration", f"self:text:{texts}/cal.txt@batch=4", "--windows", "4", "--window-tokens", "64"),
    ]


def test_a_run_on_sampled_text(nmbench, finished, flags, records, tmp_path):
    """Record, table and report say that the text was sampled, and its cost; the same command samples nothing again."""
    result = finished(*flags, "--out", "out")
    said = "NOTE calibration text: 4 windows sampled from the dense model, prompts of 16 tokens from text:"
    assert said in result.stdout and "shared by all rows and counted in none" in result.stdout
    dense, row = records(tmp_path / "out")
    assert dense["sampled"] is None
    assert row["sampled"]["windows"] == 4 and row["sampled"]["forward_tokens"] == 5 * 63
    report = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert "windows sampled from the dense model" in report.splitlines()[0]
    assert "temperature 1.0, top_p none" in report.splitlines()[0]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text(encoding="utf-8"))
    assert manifest["sampled"]["0"] == row["sampled"]
    (piece,) = (tmp_path / "out/sampled").iterdir()
    before = piece.stat().st_mtime_ns
    assert nmbench("run", *flags, "--out", "out").exit_code == 0
    assert piece.stat().st_mtime_ns == before
    assert records(tmp_path / "out") == [dense, row]


def test_calibration_of_two_kinds_is_not_ranked_together(nmbench, finished, flags, records, texts, tmp_path):
    """Rows on sampled and on real text are two protocols with a ranking each; one directory refuses both.

    Their cost is the same, because no row counts the cost of sampling.
    """
    flags = ["demo" if flag == "tiny:llama" else flag for flag in flags]  # nothing is ranked under a random model
    flags += ["--window-tokens", "24"]
    finished(*flags, "--out", "out")
    own = [flag if not flag.startswith("self:") else f"text:{texts}/cal.txt" for flag in flags]
    result = nmbench("run", *own, "--out", "out")
    assert result.exit_code == 1 and "calibration was 'self:text:" in result.stderr
    finished(*own, "--out", "own")
    assert records(tmp_path / "own")[1]["cost"] == records(tmp_path / "out")[1]["cost"]
    assert records(tmp_path / "own")[1]["sampled"] is None
    report = nmbench("report", "out", "own").stdout
    assert "NOTE out: calibration text: 4 windows sampled" in report and "NOTE own" not in report
    rankings = [line for line in report.splitlines() if line.startswith(("  out ", "  own "))]
    assert len(rankings) == 2 and all(line.count("wanda") == 1 for line in rankings)


@pytest.mark.parametrize(
    ("calibration", "said"),
    [
        ("self:", "Error: self: needs a data set after the colon"),
        ("self", "Error: self: needs a data set after the colon"),
        ("self:demo@windows=3", "Error: unknown option 'windows' of self."),
        ("self:text:nowhere.txt", "Error: text file nowhere.txt does not exist."),
    ],
)
def test_bad_input_is_one_line(nmbench, flags, calibration, said):
    """A bad reference is one line and exit status 1."""
    result = nmbench("run", *flags, "--calibration", calibration, "--out", "out")
    assert result.exit_code == 1
    assert result.stderr.startswith(said) and len(result.stderr.splitlines()) == 1


def test_export_reads_the_same_samples(nmbench, finished, flags, tmp_path):
    """A row with repaired weights is made again from the samples of its run directory, or from new ones alike."""
    flags = ["sparsegpt" if flag == "wanda" else flag for flag in flags]
    finished(*flags, "--out", "out")
    assert nmbench("export", "out", "sparsegpt", "--to", "kept").exit_code == 0
    (piece,) = (tmp_path / "out/sampled").iterdir()
    windows = read_tensors(piece)[0]["windows"]
    piece.unlink()
    result = nmbench("export", "out", "sparsegpt", "--to", "new")
    assert result.exit_code == 0, result.output
    assert read_tensors(piece)[0]["windows"].equal(windows)
