"""Records of the first format are read as records of today; those of a later one are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nmbench.errors import NMBenchError
from nmbench.experiment.record import nothing_said
from nmbench.results.format import ADDED, FORMAT, NO_CPU, Figures, Identity, Record, upgraded
from nmbench.results.records import read_records
from nmbench.results.results import load_results

FIRST = Path(__file__).parents[1] / "data" / "format1"  # made by the first version: tiny:llama, wanda and maskpro


@pytest.fixture
def first(tmp_path):
    """A run directory of the first format, to write into."""
    return Path(shutil.copytree(FIRST, tmp_path / "first"))


def test_the_first_format_is_read(first):
    """Every field of today is there; what the first format kept among the notes has fields of its own."""
    rows = {record["label"]: record for record in load_results(first).records}
    assert list(rows) == ["dense", "maskpro@init", "maskpro", "wanda"]
    for row in rows.values():
        assert set(Identity.__annotations__) | set(Figures.__annotations__) | set(nothing_said()) <= set(row)
        assert row["format"] == FORMAT
    assert rows["wanda"]["notes"] == {}
    assert rows["wanda"]["experts"] == {"never_reached": ["a[1]"], "under_calibrated": {"a[0]": 7}}
    assert rows["wanda"]["copied_from"] == "maskpro@init"
    assert rows["maskpro"]["started_from"] == "maskpro@init"  # the line does not say it
    assert rows["maskpro"]["notes"]["steps"] == 6


def test_the_first_format_is_reported(first, nmbench):
    """`nmbench report` prints the table of such a directory, its ranking and its notes, and writes other formats."""
    result = nmbench("report", first, "--format", "csv", "--format", "json", "--out", "out")
    assert result.exit_code == 0, result.stderr
    for text in ("266.024", "maskpro@init = maskpro = wanda < dense", "NOTE wanda 2:4 seed 0", "against its initial"):
        assert text in result.output
    assert load_results(first).tidy()["value"].notna().all()


def test_the_first_format_is_exported(first, nmbench):
    """A row of such a directory is exported: its masks and the dense weights give what was measured."""
    result = nmbench("export", first, "wanda", "--to", "exported")
    assert result.exit_code == 0, result.stderr
    assert nmbench("validate", "exported").exit_code == 0


def test_a_later_format_is_refused(first):
    """A line that a newer nmbench wrote is named, with the remedy."""
    path = first / "records.jsonl"
    lines = path.read_text().splitlines()
    later = json.dumps({**json.loads(lines[1]), "format": FORMAT + 1})
    path.write_text("\n".join([lines[0], later, *lines[2:]]) + "\n")
    with pytest.raises(NMBenchError, match=rf"records.jsonl line 2 has format {FORMAT + 1}.*install a newer one"):
        read_records(path)


def test_today_is_left_alone():
    """A record of today's format comes back as it was."""
    record = Record(format=FORMAT, label="acme", notes={"same_as": "my own word"}, seconds=dict(NO_CPU), **ADDED)
    assert upgraded(record) == record


@pytest.mark.parametrize("line", ["{}", '{"label": "x"}', '{"label": 3, "status": "ok"}', '{"format": 2, "notes": []}'])
def test_a_line_that_is_no_record(first, nmbench, line):
    """A JSON object without the fields of a record is named with its file and line, and with what to do."""
    with (first / "records.jsonl").open("a") as file:
        file.write(f"{line}\n")
    result = nmbench("report", first)
    assert result.exit_code == 1
    assert "records.jsonl line 5 is not a record: " in result.stderr and "remove the line" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("odd", [None, {}, {"value": "7"}, [1]])
def test_a_metric_without_a_value(first, odd):
    """A line whose metric holds no number is named, wherever it is read."""
    path = first / "records.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    changed = {**json.loads(lines[0]), "metrics": {"ppl:x@8": odd}}
    path.write_text("\n".join([json.dumps(changed), *lines[1:]]) + "\n", encoding="utf-8")
    with pytest.raises(NMBenchError, match="line 1 is not a record: its metric 'ppl:x@8' has no value"):
        load_results(first)
