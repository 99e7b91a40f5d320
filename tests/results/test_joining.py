"""Laws of joining: seeds of one row in several run directories are one row; what differs stays apart."""

import pytest

from nmbench.results.rendering import render
from nmbench.results.results import addressed, load_results
from nmbench.results.standing import standings
from nmbench_plugins.publish.page.view import view
from reference.run_directory import record_of, write_run

DENSE = record_of("dense", None, None)


def wanda(seed, **fields):
    return record_of("wanda", seed=seed, level=0.2 + seed / 100, **fields)


@pytest.fixture
def loaded(tmp_path):
    """Load the results of lists of rows, a run directory each."""
    return lambda *runs: load_results(*(write_run(tmp_path / "ab"[n], rows) for n, rows in enumerate(runs)))


def names(results):
    return [[(line.name, line.seeds) for line in protocol.lines] for protocol in view(results).protocols]


def test_seeds_of_two_directories_are_one_row(loaded, tmp_path):
    """Means, intervals, ranks and labels are those of one directory with all seeds; dense is there once."""
    ria = [record_of("ria", seed=seed, level=0.5) for seed in (0, 1)]
    two = loaded([DENSE, wanda(0), ria[0]], [DENSE, wanda(1), ria[1]])
    one = load_results(write_run(tmp_path / "whole", [DENSE, wanda(0), ria[0], wanda(1), ria[1]]))
    assert names(two) == names(one) == [[("dense", []), ("wanda", [0, 1]), ("ria", [0, 1])]]
    for ours, theirs in zip(standings(two), standings(one), strict=True):
        assert [row.name for row in ours.rows] == [row.name for row in theirs.rows]
        assert (ours.seeds, ours.difference(1, 0)) == (theirs.seeds, theirs.difference(1, 0))
    both = two.summary()
    assert both.pop("run").tolist() == [str(tmp_path / "a"), *2 * [f"{tmp_path / 'a'} + {tmp_path / 'b'}"]]
    assert both.to_dict("list") == one.summary().to_dict("list")
    assert [(meaning.label, meaning.command.count("--seed")) for meaning in two.meanings()] == [
        ("wanda", 2),
        ("ria", 2),
    ]
    assert "a + b  wanda" in render(two) and "hold other figures" not in render(two)


def test_a_seed_with_the_same_figures_counts_once(loaded):
    """A seed that both directories hold, with the same figures, is one row, whatever it took."""
    found = loaded([DENSE, wanda(0)], [DENSE, wanda(0, prune=9.0), wanda(1)])
    assert names(found) == [[("dense", []), ("wanda", [0, 1])]]
    assert len(found.records) == 3


def test_a_seed_with_other_figures_keeps_rows_apart(loaded, tmp_path):
    """A seed with other figures keeps the rows of the directories apart, and one line says so."""
    found = loaded([DENSE, wanda(0)], [DENSE, wanda(0, measured_digest="n" * 64), wanda(1)])
    assert names(found) == [[("dense", []), ("a:wanda", [0]), ("b:wanda", [0, 1])]]
    (line,) = (line for line in render(found).splitlines() if "hold other figures" in line)
    assert line.startswith(f"NOTE wanda 2:4: {tmp_path / 'a'} and {tmp_path / 'b'} hold other figures for seed 0")


@pytest.mark.parametrize(
    "fields", [{"options": {"steps": 2}}, {"protocol_digest": "b" * 16}, {"pattern_for": {"mlp.*": "4:8"}}]
)
def test_other_work_is_another_row(loaded, fields):
    """Rows of one label with other options, patterns or another protocol are not joined."""
    found = loaded([DENSE, wanda(0)], [{**DENSE, **fields}, wanda(1, **fields)])
    assert all(len(seeds) < 2 for protocol in names(found) for _, seeds in protocol)


def test_what_a_row_begins_with_decides(loaded):
    """Learners whose starts are other work are not joined; with equal starts they are, gain over the start included."""
    learner = [record_of("maskpro", seed=seed, started_from="wanda", level=0.1) for seed in (0, 1)]
    apart = loaded([DENSE, wanda(0), learner[0]], [DENSE, wanda(1, options={"steps": 2}), learner[1]])
    assert ("a:maskpro", [0]) in names(apart)[0]
    found = loaded([DENSE, wanda(0), learner[0]], [DENSE, wanda(1), learner[1]])
    assert ("maskpro", [0, 1]) in names(found)[0]
    assert any("maskpro against its initial mask" in line for line in found.rankings())


def test_an_address_chooses_before_rows_are_joined(loaded, tmp_path):
    """Addresses choose in their own directory; what is left is joined."""
    loaded([DENSE, wanda(0), wanda(1)], [DENSE, wanda(0), wanda(2)])
    found = addressed([tmp_path / "a:wanda:2:4:0", tmp_path / "b:wanda:2:4:2"])
    assert names(found) == [[("dense", []), ("wanda", [0, 2])]]


def test_joined_rows_share_the_pareto_front(loaded):
    """Rows of joined directories are rivals on the front, also those that only one of them holds."""
    fast = record_of("fast", level=0.1, prune=0.1)
    found = loaded([DENSE, wanda(0, prune=5.0), fast], [DENSE, wanda(1, prune=5.0)])
    assert dict(zip(found.summary()["label"], found.summary()["pareto"], strict=True))["wanda"] == "-"
