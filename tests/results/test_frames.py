"""Laws of the pandas frames: every figure of the records is in them once, under a column that is documented."""

import csv

import pandas
import pytest

import nmbench
from nmbench.results.frames import TIDY, WIDE, describe
from nmbench.results.results import load_results
from reference.run_directory import record_of, write_run


@pytest.fixture
def done(finished, small, texts, tmp_path):
    """Results of a run with every kind of metric, and its records."""
    text = f"text:{texts}/test.txt@64"
    metrics = [flag for word in ("kl", "top1", "layers") for flag in ("--metric", f"{word}:{text}")]
    result = finished(*small, *metrics, "--method", "sparsegpt", "--method", "magnitude")
    return load_results(tmp_path / "out"), result


def test_tidy_has_a_row_for_every_value(done):
    """Each metric of each record is one row with its value and the cost of its job, in columns that are documented."""
    results, _ = done
    frame = results.tidy()
    assert list(frame.columns) == list(TIDY)
    assert len(frame) == sum(len(record["metrics"]) for record in results.records) == 5 * 5
    for record in results.records:
        mine = frame[frame["label"] == record["label"]].set_index("metric")
        assert mine["value"].to_dict() == {name: figures["value"] for name, figures in record["metrics"].items()}
        assert set(mine["forward_tokens"]) == {record["cost"]["forward_tokens"]}
        assert set(mine["peak_host_bytes"]) == {record["peak_bytes"]["host"]}
        assert set(mine["prune_seconds"]) == {record["seconds"]["prune"]}
    fronts = frame[["pareto_seconds", "pareto_tokens", "pareto_bytes"]]
    assert fronts[frame["label"] == "dense"].isna().all(axis=None)
    assert fronts[frame["label"] == "magnitude"]["pareto_tokens"].all()  # nobody is cheaper than none


def test_every_column_is_documented(done):
    """The frame of a real run has no column that `describe` does not know, and the details are not among them."""
    results, _ = done
    frame = results.frame()
    assert [column for column in frame.columns if describe(column) is None] == []
    assert not [column for column in frame.columns if "detail" in column]
    assert describe("nonsense") is None
    rare = ("directory", "row_directory", "error", "traceback")
    plain = [name for name in WIDE if "*" not in name and name not in rare]
    assert [name for name in plain if name not in frame.columns] in ([], ["proof", "coverage"])


def test_counts_are_whole_numbers(nmbench, small, tmp_path):
    """In the CSV tokens, seeds, bytes and groups are written as whole numbers, and what is missing is empty, also where
    a row failed; figures with a fraction are as they were.
    """
    flags = [*small[: small.index("--set")], "--method", "wanda", "--method", "bad=swaps", "--set"]
    assert nmbench("run", *flags, "bad.skip_tokens=999", "--out", "out").exit_code == 1
    with (tmp_path / "out" / "report.csv").open(encoding="utf-8", newline="") as file:
        dense, wanda, bad = csv.DictReader(file)
    results = load_results(tmp_path / "out")
    (metric,) = results.records[0]["metrics"]
    counts = ["seed", "cost.forward_tokens", "peak_bytes.host", "proof.groups", "coverage.layers", f"{metric}.n"]
    for name in counts:
        assert all(row[name] == "" or row[name].isdigit() for row in (dense, wanda, bad)), name
        assert wanda[name], name
    assert (dense["seed"], bad["seed"], bad["cost.forward_tokens"], bad["peak_bytes.device"]) == ("", "0", "", "")
    assert float(wanda[metric]) == results.records[1]["metrics"][metric]["value"]
    assert results.tidy()["seed"].tolist() == [pandas.NA, 0]


def test_details_hold_every_layer(done):
    """The errors of all layers are a frame: one row per job and layer, whose mean and maximum the table shows."""
    results, run = done
    frame = results.details()
    (name,) = frame["metric"].unique()
    assert name.startswith("layers:text:")
    by_label = frame.groupby("label")["value"]
    assert set(by_label.count()) == {14}
    for record in results.records:
        figures = record["metrics"]
        assert by_label.mean()[record["label"]] == pytest.approx(figures[name]["value"])
        assert by_label.max()[record["label"]] == figures[f"{name} worst"]["value"]
    worst = results.records[-1]["metrics"][f"{name} worst"]
    assert f"{worst['value']:.4f} {worst['where']}" in run.stdout


def test_values_are_what_they_should_be(done):
    """Dense has no divergence and no layer error; pruned rows have; by a random model none is ranked."""
    results, run = done
    table = results.tidy().pivot(index="label", columns="metric", values="value")
    kl, top1, errors = (next(c for c in table if c.startswith(word)) for word in ("kl:", "top1:", "layers:"))
    assert (table.loc["dense", kl], table.loc["dense", top1], table.loc["dense", errors]) == (0, 1, 0)
    pruned = table.drop("dense")
    assert (pruned[kl] > 0).all() and (pruned[top1] < 1).all() and (pruned[errors] > 0).all()
    assert pruned.loc["sparsegpt", errors] < pruned.loc["magnitude", errors]
    for metric in (kl, top1):
        assert f"2:4 {metric}: no ranking, because the dense model does not predict this text" in run.stdout


def test_summary_and_public_names(done):
    """The public loader gives all of it; the summary has one row per label."""
    results = nmbench.load_results(*done[0].directories)
    assert isinstance(results.tidy(), pandas.DataFrame)
    assert results.summary()["label"].tolist() == ["dense", "maskpro@init", "maskpro", "sparsegpt", "magnitude"]


def test_results_show_themselves(tmp_path):
    """Printed, results are one line; a notebook shows protocol and table, best row first, escaped."""
    rows = [record_of("dense", None, None), record_of("far", level=0.5), record_of("near", model="<demo>")]
    failed = {**record_of("bad", losses=None), "status": "failed", "metrics": {}, "error": "broken"}
    results = load_results(write_run(tmp_path / "a", [*rows, failed]))
    assert repr(results) == f"<Results: 4 rows of demo, <demo> at 2:4, 1 failed; {tmp_path / 'a'}>"
    html = results._repr_html_()
    assert html.index("<td>near</td>") < html.index("<td>far</td>") < html.index("<td>bad</td>")
    assert "&lt;demo&gt;" in html and "<demo>" not in html
