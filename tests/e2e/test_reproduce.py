"""`nmbench reproduce` on a tiny model and a table of the test's own, through the command line."""

import json

import numpy as np
import pytest

from nmbench.results.files import load_masks

ROWS = ("dense", "magnitude", "wanda")


@pytest.fixture
def recorded(finished, small, texts, records, tmp_path):
    """Run magnitude and Wanda, and write the figures down as if they were published; returns a function that does."""
    flags = small[: small.index("--set")]
    finished(*flags, "--method", "magnitude", "--method", "wanda", "--out", "recorded")
    rows = {row["label"]: row for row in records(tmp_path / "recorded")}

    def table(model="tiny:llama", masks=False, **off):
        metric = next(iter(rows["dense"]["metrics"]))
        lines = [line(label, metric, rows[label]["metrics"][metric]["value"] * off.get(label, 1)) for label in ROWS]
        if masks:
            lines[1] = lines[1].replace('"magnitude"', '"theirs"') + 'masks = { repository = "a/b", file = "m.npz" }\n'
        run = f'calibration = "text:{texts}/cal.txt"\nwindows = 4\nwindow_tokens = 64\npool_tokens = 2048\n'
        head = f'title = "tiny"\nmodel = "{model}"\npattern = "2:4"\nsource = "a test"\n[run]\n{run}'
        (tmp_path / "own.toml").write_text(head + "selection_tokens = 1024\n" + "\n".join(lines))
        return "own.toml"

    return table


def line(label, metric, value):
    return f'[[line]]\nlabel = "{label}"\nmetric = "{metric}"\nvalue = {value!r}\ntolerance = 1e-6\nbecause = "same"\n'


def test_a_table_is_reproduced(nmbench, recorded, records, tmp_path):
    """All lines within: exit 0, and an ordinary run directory whose records hold the figures."""
    result = nmbench("reproduce", recorded(), "--out", "out")
    assert result.exit_code == 0, result.output
    assert "REPRODUCED: 3 of 3 lines within tolerance." in result.stdout
    assert [row["label"] for row in records(tmp_path / "out")] == list(ROWS)
    assert (tmp_path / "out/report.csv").exists()
    before = (tmp_path / "out/records.jsonl").read_bytes()
    assert nmbench("reproduce", "own.toml", "--out", "out").stdout == result.stdout
    assert (tmp_path / "out/records.jsonl").read_bytes() == before  # finished jobs are not done again


def test_a_line_outside_its_tolerance(nmbench, recorded):
    """One line outside: exit 1, the line is named in the table and in the last line, the others are within."""
    result = nmbench("reproduce", recorded(wanda=1.01), "--out", "out", "--quiet")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert next(text for text in lines if text.startswith("wanda ")).split()[-1] == "OUTSIDE"
    assert "(-1.0%)" in result.stdout
    assert any(text.startswith("NOT REPRODUCED: 2 of 3 lines within tolerance; wanda ppl:") for text in lines)
    assert nmbench("reproduce", "own.toml", "--out", "out", "--only", "magnitude").exit_code == 0


def test_an_interrupted_run_goes_on(nmbench, recorded, records, tmp_path, monkeypatch):
    """Interrupted after the first rows, the same command makes the others and gives its verdict."""
    from nmbench.results.directory import RunDirectory

    def append(directory, record, done=RunDirectory.append):
        done(directory, record)
        if record["label"] == "magnitude":
            raise KeyboardInterrupt

    name = recorded()
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "append", append)
        assert nmbench("reproduce", name, "--out", "out").exit_code == 130
    first = records(tmp_path / "out")
    assert [row["label"] for row in first] == ["dense", "magnitude"]
    assert nmbench("reproduce", name, "--out", "out").exit_code == 0
    assert records(tmp_path / "out")[:2] == first


def test_published_masks_and_another_model(nmbench, recorded, tmp_path):
    """A published mask file becomes a row; a model in place of the published one is said beside every figure."""
    masks = load_masks(tmp_path / "recorded/masks/magnitude--2-4--seed0.safetensors") if recorded(masks=True) else {}
    bits = {f"{name}.weight": np.packbits(mask) for name, mask in masks.items()}
    shapes = {f"{name}.weight.__shape__": mask.shape for name, mask in masks.items()}
    np.savez_compressed("m.npz", __meta__=np.array(json.dumps({"base_model": "acme/absent"})), **bits, **shapes)
    name = recorded(model="hf:acme/absent", masks=True)
    result = nmbench("reproduce", name, "--model", "tiny:llama", "--masks", "m.npz", "--out", "out")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("tiny:llama, not hf:acme/absent") == 3
    assert "masks: m.npz of hf:a/b" in result.stdout


def test_a_row_that_fails(nmbench, recorded):
    """A failed row is no figure: its line says so, and the exit status is 1."""
    name = recorded(masks=True)
    np.savez_compressed("m.npz", **{"model.layers.0.mlp.up_proj.weight": np.zeros(8, np.uint8)})
    result = nmbench("reproduce", name, "--masks", "m.npz", "--out", "out")
    assert result.exit_code == 1
    assert "NOT REPRODUCED: 2 of 3 lines within tolerance; theirs" in result.stdout


def test_the_list_and_an_unknown_name(nmbench):
    """Without a name the tables are listed; an unknown name is one line with the nearest one."""
    result = nmbench("reproduce")
    assert result.exit_code == 0
    assert "llama-3.2-1b " in result.stdout
    result = nmbench("reproduce", "llama-3.2-1")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "unknown published table 'llama-3.2-1'. Did you mean 'llama-3.2-1b'?" in result.stderr
    assert nmbench("reproduce", "nothing.toml").exit_code == 1
