"""Laws of the comparison of two runs: rows are matched, changes are judged in pairs, and what is unlike is refused."""

import json

import pytest

from nmbench.artifacts.difference import compare
from nmbench.artifacts.kept_masks import open_masks
from nmbench.comparison import paired
from nmbench.errors import NMBenchError
from nmbench.results.mask_overlap import differing_bits
from nmbench.results.results import load_results
from nmbench.results.two_runs import compared_runs, comparison_text, verdict_line
from reference.run_directory import ENVIRONMENT, TEXT, losses_of, record_of, write_masks, write_run


def proof(digest):
    return {"proof": {"layers": 2, "groups": 48, "weights": 192, "zeros": 96, "masks_digest": digest}}


def first():
    """Rows of run A: at one pattern three labels, one of them with two seeds."""
    labels = [("steady", 0), ("worse", 0), ("worse", 1), ("better", 0), ("noisy", 0)]
    return [record_of("dense", None, None), *(record_of(label, seed=seed, **proof("m")) for label, seed in labels)]


def second():
    """Rows of run B: one as it was, one worse, one better, one with other noise."""
    noisy = {**record_of("noisy", **proof("m")), "losses": losses_of(0.0, 0.01, seed=99)}
    worse = [record_of("worse", seed=seed, level=0.02, prune=3.0, **proof("n")) for seed in (0, 1)]
    better = record_of("better", level=-0.01, options={"steps": 9}, **proof("m"))
    return [record_of("dense", None, None), record_of("steady", **proof("m")), *worse, better, noisy]


@pytest.fixture
def runs(tmp_path):
    """Write two runs; return them as results."""

    def write(ours, theirs):
        return [load_results(write_run(tmp_path / name, rows)) for name, rows in (("a", ours), ("b", theirs))]

    return write


def test_rows_are_judged_by_paired_differences(runs):
    """A row over its common seeds has the difference of `paired`, and the verdict that its interval gives."""
    found = compared_runs(*runs(first(), second()))
    assert {row.name: row.verdict for row in found.rows} == {
        **{"dense": "same", "steady 2:4": "same", "worse 2:4": "worse", "better 2:4": "better"},
        **{"noisy 2:4": "within noise"},
    }
    noisy = found.rows[-1].changes[0].difference
    assert noisy == paired(second()[-1]["losses"], first()[-1]["losses"])
    worse = found.of("worse")[0]
    assert (worse.seeds, worse.costs["seconds"], worse.masks != worse.masks) == ([0, 1], (1.0, 3.0), True)
    assert verdict_line(found) == (
        "B against A: of 5 rows 1 better (better 2:4 -0.0100 nats); 1 worse (worse 2:4 +0.0200 nats); "
        "1 changed within noise; 2 the same."
    )


def test_what_changed_is_said_once(runs):
    """Options, versions and rows of one run alone are named; a row that failed in the other run is no silent loss."""
    theirs = [{**row, "environment": {**ENVIRONMENT, "torch": "2.14.0"}} for row in (*second(), record_of("new"))]
    theirs[1] |= {"status": "failed", "error": "out of memory", "metrics": {}}
    found = compared_runs(*runs(first(), theirs))
    assert found.settings == ["torch 2.13.0 -> 2.14.0", "better.steps - -> 9"]
    assert found.only_a == ["steady 2:4 seed 0 (failed there: out of memory)"]
    assert found.only_b == ["new 2:4 seed 0"]
    text = comparison_text(found)
    assert text.count("2.14.0") == 1 and "only in B: new 2:4 seed 0" in text
    assert "failed in the other" in text.splitlines()[-1]


def test_unlike_protocols_are_not_judged(runs):
    """Under two protocols the figures stand side by side, and no row has an interval or another verdict."""
    theirs = [{**row, "protocol_digest": "b" * 16} for row in second()]
    found = compared_runs(*runs(first(), theirs))
    assert {change.verdict for row in found.rows for change in row.changes} == {"cannot tell"}
    assert {change.difference for row in found.rows for change in row.changes} == {None}
    assert verdict_line(found).startswith("B against A: it cannot be told, because the protocols differ (protocol)")


def test_changes_of_rounding_are_the_same(runs):
    """A change that four decimals print as zero is no change, however narrow its interval is."""
    found = compared_runs(*runs([record_of("x")], [record_of("x", level=2e-5)]))
    assert (found.rows[0].verdict, found.changed, found.judged) == ("same", False, True)


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ([record_of("x", model="other")], "is of demo, .*b of other; compare runs of one model"),
        ([record_of("dense", None, None), record_of("x", seed=1)], "no row is in both .x 2:4 seed 0; and x 2:4 seed 1"),
        ([record_of("x", metrics={"ppl:else@64": {"value": 1.0, "lower_is_better": True}})], "no metric is the same"),
    ],
)
def test_refusals(runs, theirs, words):
    """Runs without anything to compare are refused, with both directories and the remedy."""
    with pytest.raises(NMBenchError, match=words):
        compared_runs(*runs([record_of("dense", None, None), record_of("x")], theirs))


def test_other_test_tokens_under_one_name(runs, tmp_path):
    """A text whose tokens are not those of the other run is no common metric."""
    for name, digest in (("a", "1"), ("b", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"test_digests": {"plays": digest}}))
    with pytest.raises(NMBenchError, match="no metric is the same on the same test tokens"):
        compared_runs(*runs([record_of("x")], [record_of("x")]))


def test_without_losses_it_cannot_be_told(nmbench, runs, tmp_path):
    """A figure whose losses were not kept is shown without a verdict, with the reason and exit status 3."""
    runs([record_of("x")], [{**record_of("x", level=0.1), "losses": None}])
    result = nmbench("compare", tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 3
    assert f"cannot tell: ppl:{TEXT}: B kept no losses by window for it" in result.stdout


def test_share_of_mask_bits_is_that_of_diff(runs, tmp_path):
    """The share of bits that differ is one minus the share of equal bits that `nmbench diff` prints."""
    rows = record_of("x", **proof("m")), record_of("x", **proof("n"))
    results = runs(*([row] for row in rows))
    for number, (name, row) in enumerate(zip("ab", rows, strict=True)):
        write_masks(tmp_path / name, row, number)
    (row,) = compared_runs(*results).rows
    equal = compare(*(open_masks(f"{tmp_path / name}:x") for name in "ab")).total.shares["bits"]
    assert row.masks == pytest.approx(1 - equal) and 0 < row.masks < 1
    file = tmp_path / "a/masks/x--2-4--seed0.safetensors"
    assert differing_bits(file, file) == 0


def test_the_command(nmbench, runs, tmp_path):
    """Exit status 0: no change beyond noise, 1: some row changed, 3: refused; rows are chosen as in `report`."""
    runs(first(), second())
    changed = nmbench("compare", tmp_path / "a", tmp_path / "b")
    assert changed.exit_code == 1, changed.output
    assert max(map(len, changed.stdout.splitlines()[3:-1])) <= 80
    assert nmbench("compare", tmp_path / "a", tmp_path / "b", "--method", "noisy").exit_code == 0
    assert nmbench("compare", tmp_path / "a", tmp_path).exit_code == 3
    found = json.loads(nmbench("compare", tmp_path / "a", tmp_path / "b", "--json").stdout)
    assert [row["masks_equal"] for row in found["rows"]] == [None, True, False, True, True]
    assert found["rows"][2]["cost"]["seconds"] == {"a": 1.0, "b": 3.0, "ratio": 3.0}
    assert found["verdict"] == changed.stdout.splitlines()[-1]
