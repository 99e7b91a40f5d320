"""Laws of the address of a row: one form for all commands, and the rows that each part of it leaves."""

import pytest

from nmbench.artifacts.artifact import Unreadable
from nmbench.artifacts.reading import row_masks
from nmbench.errors import NMBenchError
from nmbench.results.address import Address, address_of, shown
from nmbench.results.results import addressed
from reference.run_directory import record_of, write_masks, write_run


@pytest.fixture
def run(tmp_path):
    """A run directory with a colon in its name, rows at two patterns and seeds, and their masks."""
    rows = [record_of("x", "2:4", 0), record_of("x", "2:4", 1), record_of("x", "4:8", 0), record_of("tuned@x")]
    path = write_run(tmp_path / "a:b", [record_of("dense", None, None), *rows])
    for seed, row in enumerate(rows):
        write_masks(path, row, seed)
    return path


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("x", ("x", None, None)),
        ("x:2:4", ("x", "2:4", None)),
        ("x:2:4:1", ("x", "2:4", 1)),
        ("x:1", ("x", None, 1)),
        ("x--2-4--seed1", ("x", "2:4", 1)),
        ("tuned@x:2:4:0", ("tuned@x", "2:4", 0)),
        ("x:2:4x2:1", ("x", "2:4x2", 1)),
        ("x--2-4x2--seed1", ("x", "2:4x2", 1)),
    ],
)
def test_forms(run, text, parts):
    """Label, then pattern, then seed, or the name of the files of a row; shown again, the address is the same."""
    assert address_of(f"{run}:{text}") == Address(run, *parts)
    assert address_of(f"{run}:{shown(*parts)}") == Address(run, *parts)


def test_no_address(run, tmp_path):
    """A text without a run directory, or with something else behind the colon, is none."""
    assert [address_of(text) for text in (str(run), f"{tmp_path}:x", f"{run}:x:2:4:0:1", f"{run}:")] == [None] * 4


def test_rows_of_addresses(run):
    """Results of addresses have their rows beside dense, each once; an address without a row is refused."""

    def names(*texts):
        found = addressed([run.with_name(f"{run.name}{text}") for text in texts]).records
        return [(record["label"], record["pattern"], record["seed"]) for record in found[1:]]

    assert names(":x:4:8") == [("x", "4:8", 0)]
    assert names(":x:0", ":x:2:4") == [("x", "2:4", 0), ("x", "2:4", 1), ("x", "4:8", 0)]
    assert len(names("", ":x")) == 4
    with pytest.raises(NMBenchError, match="no row is of that pattern"):
        names(":y")


def test_masks_of_an_address(run):
    """An address names the masks of one row; of several, or of none, the rows are listed as addresses."""
    assert row_masks(f"{run}:x:2:4:1") == run / "masks/x--2-4--seed1.safetensors"
    assert row_masks(f"{run}:tuned@x") == run / "masks/tuned@x--2-4--seed0.safetensors"
    with pytest.raises(Unreadable, match=r"several rows named 'x:2:4'. Rows: x:2:4:0, x:2:4:1"):
        row_masks(f"{run}:x:2:4")
    with pytest.raises(Unreadable, match="no row named 'y'"):
        row_masks(f"{run}:y")
