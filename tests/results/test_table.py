"""Laws of the table a run ends in: its rows, the means over seeds, the rankings and the failures."""

import io
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.experiment.contenders import Contender
from nmbench.experiment.jobs import Job
from nmbench.methods import Scorer
from nmbench.results.files import write_tensors
from nmbench.results.ranking import chain, file_name
from nmbench.results.rendering import render, show
from nmbench.results.results import Results
from nmbench.results.table import means, row
from nmbench.spec import DENSE
from nmbench.testing.strategies import patterns

quick = settings(max_examples=25, deadline=None)
TEXT = "demo@8"
HARD = torch.linspace(1, 5, 12, dtype=torch.float64)  # losses of a dense model on twelve windows
NOISE = torch.tensor([1.0, -1.0] * 6, dtype=torch.float64)


def record(label, value, pattern="2:4", seed=0, protocol="p", **others):
    """The record of a job that ended well."""
    dense = label == "dense"
    return {
        "format": 2,
        "started_from": f"{label}@init",
        "notes": {},
        "layer_notes": {},
        "figures": {},
        "experts": {},
        "copied_from": None,
        "curve": [],
        "label": label,
        "pattern": None if dense else pattern,
        "seed": None if dense else seed,
        "job_digest": f"{protocol} {label} {pattern} {seed}",
        "protocol_digest": protocol,
        "status": "ok",
        "strict": None if dense else True,
        "proof": None if dense else {"groups": 640, "extra_zeros": 0},
        "weights_changed": label == "sparsegpt",
        "coverage": None if dense else {"share_of_decoder": 0.9876},
        "metrics": {"ppl:demo@8": {"value": value, "stderr": 0.5, "n": 12, "lower_is_better": True}},
        "against_dense": {} if dense else {TEXT: {"mean": 0.25, "low": -0.125, "high": 0.5, "windows": 12}},
        "seconds": {
            "prune": 1.0,
            "evaluate": 2.0,
            "total": 3.0,
            "prune_cpu": 1.0,
            "evaluate_cpu": 2.0,
            "cpu_share": 1.0,
        },
        "environment": {"device": "cpu"},
        "peak_bytes": {"host": 300 * 2**20, "host_growth": 30 * 2**20, "device": None},
        "cost": {"forward_tokens": 4096},
        **others,
    }


def failed(label, error="no such luck", seed=0):
    figures = ("proof", "weights_changed", "against_dense", "peak_bytes", "cost")
    content = {name: value for name, value in record(label, 0.0, seed=seed).items() if name not in figures}
    return {**content, "status": "failed", "strict": None, "metrics": {}, "error": error, "traceback": "errors/x.txt"}


def write_losses(directory, done, losses):
    path = directory / "losses" / f"{file_name(done)}.safetensors"
    write_tensors(path, {TEXT: losses}, {"job_digest": done["job_digest"]})


def results(directory, *rows):
    """Results of records, each with its losses (or None for a job without any)."""
    for done, losses in rows:
        if losses is not None:
            write_losses(directory, done, losses)
    return Results([done for done, _ in rows], [directory])


@pytest.fixture
def two_seeds(tmp_path):
    """Dense, and two seeds of a learner, of its initial mask and of a method that failed once."""
    rows = [(record("dense", 20.0), HARD)]
    for seed in (0, 1):
        rows += [(record("acme@init", 40.0 + seed, seed=seed), HARD + 0.7 + 0.01 * NOISE)]
        rows += [(record("acme", 30.0 + 2 * seed, seed=seed), HARD + 0.4 + 0.01 * NOISE + 0.02 * seed)]
    rows += [(record("sparsegpt", 35.0), HARD + 0.5), (failed("sparsegpt", "U is not finite", seed=1), None)]
    return results(tmp_path, *rows)


def lines_with(text, *words):
    return [line for line in text.splitlines() if all(word in line for word in words)]


# Rows


def test_every_job_has_a_row(two_seeds):
    """The table has one line for each record with label, pattern and seed: dense, best first, failures last."""
    table = render(two_seeds).split("\n\n")[0].splitlines()
    values = {id(done): done["metrics"].get("ppl:demo@8", {}).get("value", math.inf) for done in two_seeds.records}
    rows = sorted(two_seeds.records, key=lambda done: values[id(done)])
    assert len(table) == 1 + len(rows)
    for line, done in zip(table[1:], rows, strict=True):
        assert line.split()[:3] == [
            done["label"],
            done["pattern"] or "-",
            "-" if done["seed"] is None else str(done["seed"]),
        ]


def test_a_number_never_travels_alone():
    """A row shows the value beside its proof, difference to dense, share pruned, cost in seconds, bytes and tokens."""
    assert row(record("acme", 31.23456)) == {
        "label": "acme",
        "pattern": "2:4",
        "seed": "0",
        "strict": "yes, 640 groups",
        "ppl:demo@8": "31.235",
        "nats over dense, demo@8": "+0.2500 [-0.1250, +0.5000]",
        "in N:M": "98.8%",
        "weights": "dense",
        "prune s": "1.0",
        "MiB grown": "30",
        "tokens": "4096",
    }
    assert row(record("sparsegpt", 31.2))["weights"] == "updated"
    assert (
        row(record("acme", 31.2, peak_bytes={"host": 9, "host_growth": 2**20, "device": 5 * 2**20}))["MiB grown"]
        == "1 + 5"
    )


def test_backward_tokens_are_told_apart():
    """Tokens run backward stand beside those run forward, where there are any."""
    trained = record("acme", 31.2, cost={"forward_tokens": 4096, "backward_tokens": 512})
    assert row(trained)["tokens"] == "4096 + 512 back"


def test_what_a_value_is_of_stands_beside_it():
    """A metric that says what its value is of, as the layer of a maximum, is shown with it; its details are not."""
    worst = {"value": 0.51234, "stderr": None, "n": 2, "lower_is_better": True, "where": "layers.0.up_proj"}
    mean = {"value": 0.25, "stderr": None, "n": 2, "lower_is_better": True, "detail": {"layers.0.up_proj": 0.51234}}
    shown = row(record("acme", 31.2, metrics={"layers:demo@8": mean, "layers:demo@8 worst": worst}))
    assert shown["layers:demo@8 worst"] == "0.5123 layers.0.up_proj"
    assert shown["layers:demo@8"] == "0.2500"


def test_dense_claims_no_proof():
    """The dense row has no pattern, seed, proof or share pruned, but a value."""
    shown = row(record("dense", 20.0))
    assert {shown[name] for name in ("pattern", "seed", "strict", "in N:M")} == {"-"}
    assert shown["ppl:demo@8"] == "20.000"


def test_failed_row_shows_no_number():
    """A failed job says FAILED where the proof would stand, and has no figure in any column."""
    shown = row(failed("acme"))
    assert shown["strict"] == "FAILED"
    assert not {"ppl:demo@8", "nats over dense, demo@8"} & set(shown)
    assert {shown[name] for name in ("weights", "prune s", "MiB grown", "tokens")} == {"-"}


def test_failures_are_one_line_each(two_seeds):
    """Every failed job is named once below the table with its error and its traceback, on one line."""
    (line,) = lines_with(render(two_seeds), "FAILED", "traceback")
    assert line == "FAILED sparsegpt 2:4 seed 1: U is not finite (traceback: errors/x.txt)"


def test_no_failures_no_word_of_them(tmp_path):
    """Where all went well, nothing is said of failures, and with one seed nothing of means."""
    text = render(results(tmp_path, (record("dense", 20.0), HARD), (record("acme", 30.0), HARD + 0.4)))
    assert "FAILED" not in text
    assert "Mean over seeds" not in text


# Means over seeds


def test_means_are_shown_best_first(two_seeds):
    """The printed means are in the order of their values within a pattern, with ranks by the seeds that all have."""
    table = render(two_seeds).split("Mean over seeds (± standard deviation)\n")[1].split("\n\n")[0].splitlines()
    assert [(line.split()[0], line.split()[3]) for line in table[1:]] == [
        ("dense", "-"),
        ("acme", "1"),
        ("sparsegpt", "2"),
        ("acme@init", "3"),
    ]
    assert "31.000 ± 1.414*" in table[2]
    assert "best; at 2:4 (seed 0, which all rows have)" in render(two_seeds)


def test_means_over_seeds(two_seeds):
    """With several seeds each label has mean and standard deviation of those that ended well, and their number."""
    assert "Mean over seeds" in render(two_seeds)
    shown = means(two_seeds).set_index("label")
    assert shown["ppl:demo@8"].to_dict() == {
        "dense": "20.000",
        "acme@init": "40.500 ± 0.707",
        "acme": "31.000 ± 1.414",
        "sparsegpt": "35.000",
    }
    assert shown["seeds"].to_dict() == {"dense": "1", "acme@init": "2", "acme": "2", "sparsegpt": "1"}


def test_patterns_are_never_averaged(tmp_path):
    """Rows of one label at two patterns have means of their own."""
    rows = [
        (record("acme", value, pattern, seed), None)
        for pattern, value in (("2:4", 30.0), ("4:8", 25.0))
        for seed in (0, 1)
    ]
    shown = means(results(tmp_path, *rows))
    assert shown["pattern"].tolist() == ["2:4", "4:8"]
    assert [text.split()[0] for text in shown["ppl:demo@8"]] == ["30.000", "25.000"]


def test_runs_are_never_averaged(tmp_path):
    """Rows of two run directories have means of their own, named by their run, whatever their metrics."""
    other = {"ppl:novel@9": {"value": 99.0, "stderr": None, "n": 1, "lower_is_better": True}}
    rows = [record("acme", 30.0, seed=seed, directory="a") for seed in (0, 1)]
    rows += [record("acme", 50.0, seed=seed, directory="b", metrics=other) for seed in (0, 1)]
    both = Results(rows, [Path("a"), Path("b")])
    shown = means(both)
    assert shown["run"].tolist() == ["a", "b"]
    assert shown["seeds"].tolist() == ["2", "2"]
    assert shown["ppl:demo@8"].dropna().tolist() == ["30.000 ± 0.000"]
    assert shown["ppl:novel@9"].dropna().tolist() == ["99.0000 ± 0.0000"]
    assert "run label" in " ".join(render(both).split())


# Ranks, marks and the proof


def shown_rows(text):
    """The cells of the first table below each header, row by row."""
    head, *lines = text.split("\n\n")[0].splitlines()
    return [dict(zip(re.split(r"  +", head), re.split(r"  +", line), strict=False)) for line in lines]


def test_ranks_and_marks(tmp_path):
    """A rank is 1 + the rows of the pattern that are clearly better; `*` is the best, `~` is not told apart from it."""
    rows = [(record("dense", 20.0), HARD), (record("good", 30.0), HARD + 0.4), (record("bad", 50.0), HARD + 0.9)]
    rows += [(record("twin", 31.0), HARD + 0.41 + 0.2 * NOISE), (record("copy", 30.0), HARD + 0.4)]
    rows += [(record("good", 25.0, "4:8"), HARD + 0.2), (record("bad", 26.0, "4:8"), HARD + 0.3)]
    shown = shown_rows(render(results(tmp_path, *rows)))
    found = [(row["label"], row["pattern"], row["rank"], row["ppl:demo@8"].lstrip("0123456789.")) for row in shown]
    assert found == [
        ("dense", "-", "-", ""),
        ("good", "2:4", "1", "*"),
        ("copy", "2:4", "1", "*"),
        ("twin", "2:4", "1", "~"),
        ("bad", "2:4", "4", ""),
        ("good", "4:8", "1", "*"),
        ("bad", "4:8", "2", ""),
    ]
    assert "rank: 1 + rows that are clearly better" in render(results(tmp_path, *rows))


@pytest.mark.parametrize("others", [{}, {"unranked": [TEXT]}], ids=["one row", "unpredicted text"])
def test_no_rank_where_nothing_is_compared(tmp_path, others):
    """A single row, and rows on a text that the dense model does not predict, have neither rank nor mark."""
    rows = [(record("dense", 20.0, **others), HARD), (record("a", 30.0), HARD + 0.4)]
    rows += [(record("b", 40.0), HARD + 0.9)] if others else []
    text = render(results(tmp_path, *rows))
    assert "rank" not in text.split("\n\n")[0] and "*" not in text


def test_a_failed_row_has_no_rank(two_seeds):
    """The rank of a row that failed is FAILED; dense and others keep theirs."""
    (line,) = [line for line in render(two_seeds).split("\n\n")[0].splitlines() if "FAILED" in line]
    assert line.split()[:4] == ["sparsegpt", "2:4", "1", "FAILED"]


def test_the_proof_is_said_once(two_seeds):
    """One line says that all rows that ended well are proven, and the groups that were checked; no row repeats it."""
    (line,) = lines_with(render(two_seeds), "640")
    assert line == "Strict N:M: every group of all 5 pruned rows is proven (640 at 2:4)"
    two_seeds.records[1]["proof"] = None
    assert "every group of 4 of 5 pruned rows" in render(two_seeds)


def test_a_text_has_no_control_codes(two_seeds, monkeypatch):
    """The text for files has no control codes and no spaces at line ends, whatever the terminal asks for."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = render(two_seeds)
    assert "\x1b" not in text
    assert [line for line in text.splitlines() if line != line.rstrip()] == []


def test_a_terminal_gets_the_best_in_bold(two_seeds, monkeypatch):
    """On a terminal the best figure is bold, and long lines are folded between words in its width."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = io.StringIO()
    show(two_seeds, stream, 70)
    assert re.search(r"\x1b\[1;32m *31\.000 ± 1\.414\*", stream.getvalue())
    plain = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue())
    assert max(map(len, plain.splitlines())) <= 70
    assert " ".join(lines_with(render(two_seeds), "acme against")[0].split()) in " ".join(plain.split())


def test_runs_are_named_without_what_they_share(tmp_path):
    """Run directories of one folder are shown by their names."""
    rows = [record("acme", 30.0, directory=f"/data/runs/{name}") for name in "ab"]
    assert [row["run"] for row in shown_rows(render(Results(rows, [Path("/data/runs/a"), Path("/data/runs/b")])))] == [
        "a",
        "b",
    ]


# Rankings


def test_ranking_signs(tmp_path):
    """Rows are ranked by loss, best first: `<` between those that can be told apart, `~` between those that cannot."""
    rows = [(record("dense", 20.0), HARD), (record("good", 30.0), HARD + 0.4), (record("bad", 50.0), HARD + 0.9)]
    rows += [(record("twin", 31.0), HARD + 0.41 + 0.2 * NOISE)]
    (line,) = lines_with(render(results(tmp_path, *rows)), "dense <")
    assert line.strip() == "2:4 demo@8: dense < good ~ twin < bad"


def test_ranking_by_a_metric_follows_its_direction(tmp_path):
    """Figures by window of a metric are ranked best first, which may be from high to low, and in its own unit."""
    names = {"kl:demo@8": (True, "nats/token"), "top1:demo@8": (False, "share of tokens")}
    shown = {
        n: {"value": 0.0, "stderr": None, "n": 12, "lower_is_better": low, "unit": u} for n, (low, u) in names.items()
    }
    rows = [record(label, 20.0, metrics=shown) for label in ("acme@init", "acme", "bad")]
    for done, level in zip(rows, (0.2, 0.1, 0.3), strict=True):
        kl, top1 = HARD / 50 + level, 1 - HARD / 50 - level
        path = tmp_path / "losses" / f"{file_name(done)}.safetensors"
        write_tensors(path, {"kl:demo@8": kl, "top1:demo@8": top1}, {})
    text = render(Results(rows, [tmp_path]))
    assert lines_with(text, "acme <") == [f"  2:4 {name}: acme < acme@init < bad" for name in names]
    gains = [line.split("mask ")[1] for line in lines_with(text, "against its initial mask")]
    assert gains == [
        "-0.1000 [-0.1000, -0.1000] nats/token (12 windows)",
        "+0.1000 [+0.1000, +0.1000] share of tokens (12 windows)",
    ]


def test_pareto_column(tmp_path):
    """A row says at which costs no other row of its pattern is both better and cheaper; means over seeds count."""
    cheap, dear = {"prune": 1.0, "evaluate": 2.0, "total": 3.0}, {"prune": 9.0, "evaluate": 2.0, "total": 11.0}
    rows = [
        (record("dense", 20.0), None),
        (record("good", 30.0, seconds=dear), None),
        (record("quick", 40.0, seconds=cheap), None),
        (record("bad", 50.0, seconds=dear, cost={"forward_tokens": 1, "backward_tokens": 9000}), None),
        (record("alone", 99.0, "1:4", seconds=dear), None),
        (failed("broken"), None),
    ]
    found = results(tmp_path, *rows)
    expected = ["-", "seconds tokens", "seconds", "-", "seconds tokens", "-"]
    assert found.table()["pareto"].tolist() == expected
    summary = found.summary().set_index("label")
    assert summary["pareto"].to_dict() == dict(zip(["dense", "good", "quick", "bad", "alone"], expected, strict=False))
    assert summary.loc["bad", "tokens"] == "1 + 9000 back"
    assert summary.loc["good", "prune seconds"] == "9.0"


def test_one_method_has_no_front(tmp_path):
    """With a single method there is nothing to compare, and no such column."""
    assert "pareto" not in results(tmp_path, (record("dense", 20.0), None), (record("a", 30.0), None)).table()


def test_ranking_is_by_pattern(tmp_path):
    """Each pattern has a ranking of its own, and the dense row is in all of them."""
    rows = [(record("dense", 20.0), HARD)]
    rows += [
        (record(label, 30.0, pattern), HARD + gap) for label, pattern, gap in (("a", "2:4", 0.5), ("b", "4:8", 0.2))
    ]
    text = render(results(tmp_path, *rows))
    assert lines_with(text, "2:4 demo@8:") == ["  2:4 demo@8: dense < a"]
    assert lines_with(text, "4:8 demo@8:") == ["  4:8 demo@8: dense < b"]


@quick
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_chain_is_sorted_and_whole(levels):
    """A chain names every row once, from low to high loss, and the same rows joined by `=`, different ones by `<`."""
    losses = {f"row{index}": (HARD + level)[None] for index, level in enumerate(levels)}
    words = chain(losses).split()
    labels, signs = words[::2], words[1::2]
    assert sorted(labels) == sorted(losses)
    ranked = [levels[int(label.removeprefix("row"))] for label in labels]
    assert ranked == sorted(levels)
    assert signs == ["=" if a == b else "<" for a, b in itertools.pairwise(ranked)]


def test_learner_against_its_initial_mask(two_seeds):
    """A learner's line gives the paired difference of its seeds' mean to its initial mask: negative is a gain."""
    (line,) = lines_with(render(two_seeds), "acme against its initial mask")
    found = re.search(r"2:4 demo@8: acme .* mask ([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\] nats \(12 windows\)", line)
    mean, low, high = map(float, found.groups())
    assert mean == pytest.approx(0.4 + 0.01 - 0.7, abs=1e-4)  # 0.01: the mean of the two seeds' 0 and 0.02
    assert low <= mean <= high < 0


def test_learner_that_lost_shows_a_plus(tmp_path):
    """A learner that is worse than its initial mask is shown with a positive difference."""
    rows = [(record("acme@init", 30.0), HARD + 0.2), (record("acme", 40.0), HARD + 0.5)]
    (line,) = lines_with(render(results(tmp_path, *rows)), "against its initial mask")
    assert "+0.3000 [+0.3000, +0.3000] nats" in line


def test_learner_against_the_row_it_started_from(tmp_path):
    """A learner that started from another row is compared with that one."""
    later = {**record("second", 35.0), "started_from": "first"}
    rows = [(record("first", 40.0), HARD + 0.5), (later, HARD + 0.4)]
    (line,) = lines_with(render(results(tmp_path, *rows)), "against its initial mask")
    assert "second against its initial mask -0.1000" in line


def test_learner_against_the_same_seeds_of_its_start(tmp_path):
    """Of a start with more seeds those count that the learner has."""
    later = {**record("second", 35.0, seed=1), "started_from": "first"}
    starts = [(record("first", 40.0, seed=seed), HARD + 0.5 + seed) for seed in (0, 1, 2)]
    (line,) = lines_with(render(results(tmp_path, *starts, (later, HARD + 1.4))), "against its initial mask")
    assert "second against its initial mask -0.1000" in line


def test_rows_are_compared_on_common_seeds(two_seeds, tmp_path):
    """A ranking counts the seeds that all rows have and says which; rows without a common seed are not ranked."""
    (line,) = lines_with(render(two_seeds), "dense <")
    assert line.strip() == "2:4 demo@8: dense < acme < sparsegpt < acme@init (seed 0, which all rows have)"
    apart = [(record("a", 30.0), HARD + 0.1), (record("b", 40.0, seed=1), HARD + 0.2)]
    (line,) = lines_with(render(results(tmp_path, (record("dense", 20.0), HARD), *apart)), "demo@8:")
    assert line.strip() == "2:4 demo@8: no ranking, because the rows have no seed in common (a: 0; b: 1)"


def test_equal_masks_of_unequal_seeds_are_equal(tmp_path):
    """A learner that keeps its start is not told apart from it because the start has another seed as well."""
    same = HARD + 0.3
    rows = [(record("acme@init", 40.0), same), (record("wanda", 40.0), same), (record("wanda", 50.0, seed=1), same + 1)]
    (line,) = lines_with(render(results(tmp_path, (record("dense", 20.0), HARD), *rows)), "dense <")
    assert "acme@init = wanda (seed 0, which all rows have)" in line


def test_directories_of_one_protocol_have_one_ranking(tmp_path):
    """Rows of one protocol are ranked together, named by their directory where labels repeat; others apart."""
    dense, early, late = record("dense", 20.0), record("acme", 30.0), record("acme", 30.0, seed=1)
    one = results(
        tmp_path / "a", (dense, HARD), (early, HARD + 0.2), (late, HARD + 0.8), (record("wanda", 25.0), HARD + 0.45)
    )
    two = results(tmp_path / "b", (dense, HARD), (early, HARD + 0.3), (record("new", 1.0), HARD + 3))
    joined = [{**r, "directory": str(of.directories[0])} for of in (one, two) for r in of.records]
    (line,) = lines_with(render(Results(joined, [tmp_path / "a", tmp_path / "b"])), "demo@8:")
    order = "dense < a:acme < b:acme < wanda < new (seed 0, which all rows have)"
    assert line.strip() == f"2:4 demo@8: {order}"
    other = [{**r, "protocol_digest": "q"} if r["directory"].endswith("b") else r for r in joined]
    lines = lines_with(render(Results(other, [tmp_path / "a", tmp_path / "b"])), "demo@8:")
    assert [line.split()[0] for line in lines] == [f"{tmp_path}/a", f"{tmp_path}/b"]


def test_rows_of_other_commands_are_counted(tmp_path):
    """The table of a command holds the rows that the command asked for, and says how many more there are."""
    rows = [(record("dense", 20.0), HARD), (record("acme", 30.0), HARD + 0.2), (record("wanda", 25.0), HARD + 0.4)]
    found = results(tmp_path, *rows)
    text = render(Results(found.records, found.directories, found.records[:2]))
    table, more, *_ = text.split("\n\n")
    assert "wanda" not in table and "acme" in table
    assert more == f"1 more rows of other commands: nmbench report {tmp_path}"


def test_a_busy_machine_is_named(tmp_path):
    """Seconds of a job that waited for the processor are doubted beside the table; those of others are not."""
    slow = {"prune": 60.0, "evaluate": 1.0, "total": 61.0, "prune_cpu": None, "evaluate_cpu": None}
    cases = {
        "busy": {"prune_cpu": 12.0, "cpu_share": 0.99},
        "older": {"cpu_share": 0.2},
        "idle": {"prune_cpu": 58.8, "cpu_share": 0.1},
        "unknown": {"cpu_share": None},
    }
    rows = [(record(name, 30.0, seconds={**slow, **seconds}), HARD) for name, seconds in cases.items()]
    (line,) = lines_with(render(results(tmp_path, *rows)), "NOTE")
    assert line.startswith("NOTE busy 2:4 seed 0 (12.0 of 60.0 s), older 2:4 seed 0 (12.0 of 60.0 s): the machine was")


def test_without_losses_there_is_no_ranking(tmp_path):
    """Rows whose losses are not there are listed, and not ranked."""
    text = render(results(tmp_path, (record("dense", 20.0), None), (record("acme", 30.0), None)))
    assert "acme" in text
    assert "Ranking" not in text


@quick
@given(patterns(), st.integers(0, 99), st.sampled_from(["acme", "acme@init", "a.b-c"]))
def test_table_finds_the_files_of_jobs(pattern, seed, label):
    """The file name taken from a record is the one the job gave its files."""
    job = Job(Contender(label, "magnitude", Scorer(), {}), pattern, seed, "digest", "work")
    assert file_name(record(label, 1.0, str(pattern), seed)) == job.name
    assert file_name(record("dense", 1.0)) == DENSE


def test_experts_with_too_few_tokens_are_printed(tmp_path):
    """What the notes say of fallbacks is printed with the table; rows without say nothing."""
    experts = {"never_reached": ["a[1]", "b[1]"], "under_calibrated": {"a[0]": 7, "a[2]": 3}}
    text = render(
        results(tmp_path, (record("dense", 30.0), HARD), (record("wanda", 40.0, experts=experts), HARD + 0.1))
    )
    (line,) = [line for line in text.splitlines() if line.startswith("NOTE")]
    assert line == (
        "NOTE wanda 2:4 seed 0: no token was routed to 2 weights of experts, as a[1]: pruned by the statistics of all "
        "tokens; fewer tokens than inputs were routed to 2 weights of experts, as 3 to a[2]."
    )


def test_doubts_are_printed_once(tmp_path):
    """A doubt of the run is one line; that of some rows names them; without doubts nothing is printed."""
    rows = [record("dense", 30.0, doubts=["tokenizer: odd."]), record("a", 31.0, doubts=["tokenizer: odd."])]
    rows += [record(label, 20.0, doubts=["tokenizer: odd.", "better than dense."]) for label in ("b", "c")]
    found = results(tmp_path, *[(row, HARD) for row in rows])
    expected = ["DOUBT tokenizer: odd.", "DOUBT b 2:4 seed 0, c 2:4 seed 0: better than dense."]
    assert found.doubts() == expected
    assert render(found).splitlines()[-2:] == expected
    assert "DOUBT" not in render(results(tmp_path, (record("dense", 30.0), HARD), (record("a", 31.0), HARD)))
    joined = [{**row, "directory": name} for name in ("x", "y") for row in rows[:1]]
    both = Results(joined, [Path("x"), Path("y")])
    assert both.doubts() == ["DOUBT x: tokenizer: odd.", "DOUBT y: tokenizer: odd."]


def test_no_ranking_by_a_text_that_dense_does_not_predict(tmp_path):
    """Rows are not ranked by such a text, nor by a metric on it, and the table says why; other texts are ranked."""
    rows = [record("dense", 20.0, unranked=[TEXT]), record("a", 30.0)]
    found = results(tmp_path, *[(done, None) for done in rows])
    for done, shift in zip(rows, (0.0, 1.0), strict=True):
        path = tmp_path / "losses" / f"{file_name(done)}.safetensors"
        write_tensors(path, dict.fromkeys((TEXT, f"kl:{TEXT}", "other@8"), HARD + shift), {})
    lines = [line.strip() for line in lines_with(render(found), "2:4 ") if ": " in line]
    said = "no ranking, because the dense model does not predict this text (DOUBT below)"
    assert lines == [f"2:4 {TEXT}: {said}", f"2:4 kl:{TEXT}: {said}", "2:4 other@8: dense < a"]


def test_the_protocol_names_a_sliding_window(tmp_path):
    """Attention that sees less than a test window is part of the protocol."""
    rows = [record("dense", 30.0, sliding_window=16, environment={}, model="m", calibration=None)]
    assert "sliding window 16 tokens" in results(tmp_path, (rows[0], None)).protocol()[0]


def test_the_protocol_names_all_that_differs(tmp_path):
    """Each run has one line; where its rows differ in a version, or in their pattern, all are named, once."""
    common = {"model": "demo", "calibration": "demo"}
    rows = [
        record(label, 30.0, pattern, environment={"torch": torch_version}, **common)
        for label, pattern, torch_version in (("dense", None, "2.5"), ("a", "2:4", "2.5"), ("a", "4:8", "2.6"))
    ]
    (line,) = results(tmp_path, *[(row, None) for row in rows]).protocol()
    assert line == (
        "protocol p; model demo; patterns 2:4, 4:8; metrics ppl:demo@8; calibration demo; seeds 0; torch 2.5 or 2.6."
    )
    both = Results([{**row, "directory": name} for name in ("a", "b") for row in rows], [Path("a"), Path("b")])
    assert both.protocol() == [f"a: {line}", f"b: {line}"]
