"""Laws of standings: rows of one protocol, pattern and text, best first, with all their differences."""

import pytest
import torch

from nmbench.comparison import paired
from nmbench.results.results import load_results
from nmbench.results.standing import standings
from reference.run_directory import TEXT, losses_of, record_of, write_run


def rows():
    return [
        record_of("dense", None, None),
        record_of("far", level=0.5),
        record_of("near", level=0.2),
        record_of("near", level=0.2, seed=1),
    ]


def test_best_first_with_differences_of_all_pairs(tmp_path):
    """Rows are in the order of their losses on the seeds that all have; differences are those of `paired`."""
    (found,) = standings(load_results(write_run(tmp_path / "a", rows())))
    assert ([row.name for row in found.rows], found.seeds, found.text) == (["dense", "near", "far"], (0,), TEXT)
    expected = paired(rows()[1]["losses"], rows()[2]["losses"])
    assert found.difference(2, 1).mean == pytest.approx(expected.mean)
    assert found.over_dense(1).mean == pytest.approx(float((rows()[2]["losses"] - losses_of(0.0, 0.0)).mean()))
    assert found.remark == " (seed 0, which all rows have)"


def test_a_row_over_dense_counts_all_its_seeds(tmp_path):
    """The difference of a row to dense is over its own seeds, also those that other rows lack."""
    (found,) = standings(load_results(write_run(tmp_path / "a", rows())))
    both = torch.stack([rows()[2]["losses"], rows()[3]["losses"]])
    own, expected = found.own_over_dense(1), paired(both, losses_of(0.0, 0.0))
    assert (own.mean, own.low, own.high) == pytest.approx((expected.mean, expected.low, expected.high), abs=1e-12)
    assert found.own_over_dense(2).mean == pytest.approx(found.over_dense(2).mean)


def test_patterns_and_protocols_stand_apart(tmp_path):
    """Another pattern and another protocol have standings of their own; without losses there is none."""
    other = [record_of("dense", None, None, protocol_digest="b"), record_of("near", protocol_digest="b")]
    second = record_of("near", "4:8", level=0.1)
    paths = write_run(tmp_path / "a", [*rows(), second]), write_run(tmp_path / "b", other)
    found = [(one.protocol[0], one.pattern) for one in standings(load_results(*paths))]
    assert found == [("a", "2:4"), ("a", "4:8"), ("b", "2:4")]
    bare = write_run(tmp_path / "c", [{**row, "losses": None} for row in rows()])
    assert standings(load_results(bare)) == []


def test_a_text_that_dense_does_not_predict_is_not_ranked(tmp_path):
    """The standing says so where the dense row does."""
    unranked = [{**row, "unranked": [TEXT]} for row in rows()]
    assert not standings(load_results(write_run(tmp_path / "a", unranked)))[0].ranked
