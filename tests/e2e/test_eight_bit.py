"""Runs whose weights stay in 8 bits: one doubt, one line for a method that cannot, and an export of the numbers."""

import json

import pytest

from reference.perplexity import perplexity


def test_a_run_in_8_bits_is_exported_as_numbers(finished, nmbench, small, records, tmp_path, texts):
    """The rounding is a doubt and part of the protocol, a repeated command does nothing, and an export is the row."""
    flags = (*small, "--weights", "int8")
    result = finished(*flags)
    assert "were rounded to 8 bits (--weights int8)" in result.output
    rows = {row["label"]: row for row in records(tmp_path / "out")}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["model_provenance"]["stored_weights"]["layers"] == manifest["coverage"]["layers"] == 14
    assert "prunable weights stored as int8" in (tmp_path / "out" / "report.md").read_text()
    again = nmbench("run", *flags)
    assert again.exit_code == 0 and len(records(tmp_path / "out")) == len(rows)
    other = nmbench("run", *small)
    assert other.exit_code == 1 and "another run" in other.output
    exported = nmbench("export", "out", "maskpro", "--to", "folder")
    assert exported.exit_code == 0, exported.output
    (metric,) = rows["maskpro"]["metrics"].values()
    assert perplexity(tmp_path / "folder", texts / "test.txt") == pytest.approx(metric["value"], rel=1e-5)


@pytest.mark.parametrize("method", ["sparsegpt", "soft", "least-squares"])
def test_methods_that_need_floats_are_refused(nmbench, method):
    """A method that writes weights or computes gradients is refused by its label before anything is loaded."""
    result = nmbench("run", "--model", "tiny:llama", "--weights", "int8", "--method", method)
    assert result.exit_code == 1 and len(result.output.splitlines()) == 1
    assert result.output.startswith(f"Error: {method} ") and "leave out --weights" in result.output


def test_another_form_of_weights_is_unknown(nmbench):
    """A form of weights that there is not is refused with the one that there is."""
    result = nmbench("run", "--model", "tiny:llama", "--weights", "int4", "--method", "wanda")
    assert result.exit_code == 1 and "weights must be int8" in result.output
