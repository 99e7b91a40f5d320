"""The main job through the command line: rows, files, repeating, extending, order, own models and texts."""

from __future__ import annotations

import json

import pandas
import pytest
import torch

from nmbench.pattern import Pattern
from nmbench.plain_data import read_toml
from nmbench.results.files import load_masks, read_tensors
from nmbench.results.precision import printed
from nmbench.spec import RunSpec

METHODS = ["--method", "magnitude", "--method", "wanda", "--method", "sparsegpt"]
LABELS = ["dense", "maskpro@init", "maskpro", "magnitude", "wanda", "sparsegpt"]
FIELDS = {
    *("status", "label", "method", "options", "pattern", "seed", "strict", "proof", "weights_changed", "metrics"),
    *("seconds", "peak_bytes", "cost", "calibration_digest", "job_digest", "spec_digest", "protocol_digest"),
}


@pytest.fixture
def done(finished, small, tmp_path):
    """A finished run of all built-in methods, its output and its directory."""
    return finished(*small, *METHODS), tmp_path / "out"


def test_every_job_has_a_row_with_all_fields(done, records):
    """Dense, every method, and a learner's initial mask each leave one complete record, in order."""
    rows = records(done[1])
    assert [row["label"] for row in rows] == LABELS
    assert all(set(row) >= FIELDS for row in rows)
    assert [row["strict"] for row in rows] == [None, True, True, True, True, True]
    assert [row["label"] for row in rows if row["weights_changed"]] == ["sparsegpt"]
    assert {row["protocol_digest"] for row in rows} == {rows[0]["protocol_digest"]}
    assert len({row["calibration_digest"] for row in rows[1:]}) == 1
    for row in rows:
        (metric,) = row["metrics"].values()
        assert metric["value"] > 1
        assert metric["lower_is_better"] is True
        assert row["seconds"]["total"] > 0
        assert row["seconds"]["evaluate_cpu"] > 0 and row["seconds"]["prune_cpu"] >= 0
        assert row["peak_bytes"]["host"] > 10**7


def test_a_learner_reads_selection_tokens_and_baselines_do_not(done, records):
    """The cost of a row says what its method read: statistics four windows, a learner its pool and its selection."""
    cost = {row["label"]: row["cost"] for row in records(done[1])}
    assert cost["magnitude"] == dict.fromkeys(cost["magnitude"], 0)
    assert cost["wanda"]["unique_tokens"] == 4 * 64
    gather, go_on = 4 * 64, 4 * 64 // 2  # of the two blocks, the pruned one above the last is passed through again
    assert cost["wanda"]["forward_tokens"] == gather + go_on
    assert cost["wanda"]["selection_tokens"] == 0
    assert cost["maskpro"]["selection_tokens"] == 1024
    assert 0 < cost["maskpro"]["unique_tokens"] <= 2048
    assert cost["maskpro"]["backward_tokens"] == 0


def test_the_table_names_everything_a_user_asked_for(done):
    """The printed table has pattern, proof, perplexity with its protocol, change, cost and share pruned."""
    text = done[0].output
    for piece in (
        "dense",
        "2:4",
        "Strict N:M: every group",
        "ppl:text:",
        "@64",
        "prune s",
        "MiB grown",
        "updated",
        "in N:M",
        "%",
    ):
        assert piece in text
    assert "against its initial mask" in text


def test_the_mask_files_are_strict_and_hold_the_masks_of_the_proof(done, records):
    """Every mask on disk keeps exactly N of M, and their digest is the one in the record."""
    from nmbench.verification.strict import masks_digest

    for row in records(done[1])[1:]:
        masks = load_masks(done[1] / "masks" / f"{row['label']}--2-4--seed0.safetensors")
        assert all((Pattern(2, 4).kept(mask) == 2).all() for mask in masks.values())
        assert masks_digest(masks) == row["proof"]["masks_digest"]


def test_the_start_of_a_learner_is_the_row_of_its_method(done, records):
    """`maskpro@init` is Wanda's mask on dense weights, so it equals the Wanda row to the last digit."""
    rows = {row["label"]: row for row in records(done[1])}
    assert rows["maskpro@init"]["metrics"] == rows["wanda"]["metrics"]
    assert rows["maskpro@init"]["proof"] == rows["wanda"]["proof"]


def test_reports_hold_the_same_numbers(done, records):
    """report.csv and the JSON report agree with records.jsonl."""
    frame = pandas.read_csv(done[1] / "report.csv")
    rows = records(done[1])
    (name,) = rows[0]["metrics"]
    assert list(frame["label"]) == LABELS
    assert list(frame[name]) == [row["metrics"][name]["value"] for row in rows]
    lines = (done[1] / "report.md").read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("|")]
    for row in rows:
        shown = printed(row["metrics"][name])
        assert [cells for cells in table if cells[1] == row["label"] and shown in cells], row["label"]
        assert shown in done[0].output


def test_a_copied_report_explains_itself(done, records):
    """report.md says what its table was made with: model, pattern, metric, calibration, seed, sizes, versions."""
    first, *_ = (done[1] / "report.md").read_text(encoding="utf-8").splitlines()
    row = records(done[1])[-1]
    (metric,) = row["metrics"]
    words = [f"protocol {row['protocol_digest']}", "model tiny:llama", "patterns 2:4", f"metrics {metric}"]
    words += [f"calibration {row['calibration']}", "seeds 0", "statistics from 4 windows of 64 tokens"]
    words += [f"{name} {value}" for name, value in row["environment"].items()]
    assert [word for word in words if word not in first] == []


def test_the_report_command_prints_the_table_again(done, nmbench, tmp_path):
    """`nmbench report DIR` needs no model, and writes the formats asked for."""
    result = nmbench("report", "out", "--format", "json", "--format", "csv", "--out", tmp_path)
    assert result.exit_code == 0
    assert [row["label"] for row in json.loads((tmp_path / "report.json").read_text())] == LABELS
    assert "against its initial mask" in result.output


def test_the_same_command_repeats_nothing(nmbench, small, tmp_path):
    """A second run adds no record, prints the same table, and leaves every finished file as it was."""
    first = nmbench("run", *small, "--method", "sparsegpt")
    assert first.exit_code == 0, first.output
    out = tmp_path / "out"
    finished_files = [*out.rglob("*.safetensors"), out / "records.jsonl", out / "spec.toml"]
    before = {path: path.read_bytes() for path in finished_files}
    again = nmbench("run", *small, "--method", "sparsegpt")
    assert again.exit_code == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    assert again.stdout == first.stdout


def test_a_run_directory_says_how_to_repeat_it(done, nmbench, records):
    """`--config out/spec.toml` in another directory gives the same numbers."""
    result = nmbench("run", "--config", done[1] / "spec.toml", "--out", "copy")
    assert result.exit_code == 0, result.output
    first, second = records(done[1]), records(done[1].parent / "copy")
    assert [row["metrics"] for row in first] == [row["metrics"] for row in second]
    assert [row["proof"] for row in first] == [row["proof"] for row in second]
    assert "nmbench run --config" in (done[1] / "spec.toml").read_text(encoding="utf-8").splitlines()[0]


def test_more_patterns_and_seeds_extend_a_run(done, nmbench, small, records):
    """Finished rows stay unchanged; only the new jobs are done, and the spec grows."""
    before = (done[1] / "records.jsonl").read_bytes()
    result = nmbench("run", *small, "--pattern", "1:4", "--pattern", "2:4", "--seed", 0, "--seed", 1)
    assert result.exit_code == 0, result.output
    assert (done[1] / "records.jsonl").read_bytes().startswith(before)
    added = records(done[1])[len(LABELS) :]
    assert {(row["pattern"], row["seed"]) for row in added} == {("1:4", 0), ("1:4", 1), ("2:4", 1)}
    spec = RunSpec.from_dict(read_toml(done[1] / "spec.toml"))
    assert {method.label for method in spec.methods} == {"maskpro", "magnitude", "wanda", "sparsegpt"}
    assert spec.seeds == (0, 1)


def test_a_second_method_joins_the_table_of_the_first(nmbench, finished, small, records, tmp_path):
    """Two commands of one protocol make one table: output and report hold the rows of both."""
    flags = small[: small.index("--set")]
    finished(*flags, "--method", "wanda", "--out", "out")
    result = nmbench("run", *flags, "--method", "magnitude", "--out", "out")
    assert result.exit_code == 0, result.output
    assert list(pandas.read_csv(tmp_path / "out/report.csv")["label"]) == ["dense", "wanda", "magnitude"]
    assert "1 more rows of other commands: nmbench report out" in result.stdout
    assert "wanda" in nmbench("report", "out").stdout
    learner = nmbench("run", *small)
    assert learner.exit_code == 0, learner.output
    rows = {row["label"]: row for row in records(tmp_path / "out")}
    assert rows["maskpro"]["calibration_digest"] == rows["wanda"]["calibration_digest"]
    assert rows["maskpro"]["pool_digest"]
    assert rows["wanda"]["pool_digest"] is None
    assert rows["maskpro@init"]["metrics"] == rows["wanda"]["metrics"]


def test_a_label_without_a_row_may_change_its_options(nmbench, small, tmp_path):
    """A command that was stopped before a label had a row does not bind that label's options."""
    stopped = [*small, "--set", "maskpro.window_tokens=9999"]
    assert nmbench("run", *stopped).exit_code == 1
    (tmp_path / "out/records.jsonl").unlink()
    assert nmbench("run", *small).exit_code == 0


def test_missing_files_are_made_again(nmbench, finished, small, records, tmp_path):
    """A job whose masks or losses were deleted is not finished: the same command makes them again, the same."""
    finished(*small)
    first = records(tmp_path / "out")
    (tmp_path / "out/masks/maskpro@init--2-4--seed0.safetensors").unlink()
    (tmp_path / "out/losses/dense.safetensors").unlink()
    assert nmbench("run", *small).exit_code == 0
    again = records(tmp_path / "out")
    assert [row["label"] for row in again[3:]] == ["dense", "maskpro@init"]
    assert [row["metrics"] for row in again[3:]] == [row["metrics"] for row in first[:2]]
    assert (tmp_path / "out/masks/maskpro@init--2-4--seed0.safetensors").exists()


def test_the_order_of_methods_changes_nothing(done, nmbench, small, records):
    """Every method starts from the same dense weights, tokens and random state."""
    reverse = ["--method", "sparsegpt", "--method", "wanda", "--method", "magnitude"]
    result = nmbench("run", *reverse, *small[:-2], "--out", "reverse")
    assert result.exit_code == 0, result.output
    first = {row["label"]: (row["metrics"], row["proof"]) for row in records(done[1])}
    second = {row["label"]: (row["metrics"], row["proof"]) for row in records(done[1].parent / "reverse")}
    assert first == second


@pytest.mark.parametrize("patterns", [["3:4", "16:32"], ["5:6"]], ids=",".join)
def test_any_pattern_that_divides_the_rows_will_do(nmbench, small, records, tmp_path, patterns):
    """All four methods prune to any N:M; rows of 96 inputs fall into groups of 6 only where the layers allow it."""
    skip = ["--skip", "self_attn.*", "--skip", "gate_proj", "--skip", "up_proj"] if patterns == ["5:6"] else []
    asked = [flag for pattern in patterns for flag in ("--pattern", pattern)]
    result = nmbench("run", *small, *METHODS, *asked, *skip)
    assert result.exit_code == 0, result.output
    rows = records(tmp_path / "out")[1:]
    assert sorted(row["pattern"] for row in rows) == sorted(5 * patterns)
    assert all(row["strict"] for row in rows)


def test_patterns_may_differ_by_layer(nmbench, small, records, tmp_path):
    """`--pattern-for` gives some layers another pattern, and the proof counts groups of both sizes."""
    result = nmbench("run", *small, "--method", "wanda", "--pattern-for", "mlp.*=4:8", "--skip", "q_proj")
    assert result.exit_code == 0, result.output
    masks = load_masks(tmp_path / "out/masks/wanda--2-4--seed0.safetensors")
    assert not any(name.endswith("q_proj") for name in masks)
    down = next(mask for name, mask in masks.items() if name.endswith("down_proj"))
    assert (Pattern(4, 8).kept(down) == 4).all()
    assert not (Pattern(2, 4).kept(down) == 2).all()
    assert all(row["pattern_for"] == {"mlp.*": "4:8"} for row in records(tmp_path / "out")[1:])
    assert "2:4, mlp.* 4:8" in result.stdout


def test_a_folder_of_transformers_gives_the_same_numbers(nmbench, finished, small, records, tmp_path):
    """A model saved by save_pretrained and named by its path is the same model."""
    from nmbench_plugins.tiny import TinyModel

    bundle = TinyModel().load("llama")
    bundle.model.save_pretrained(tmp_path / "model")
    bundle.tokenizer.save_pretrained(tmp_path / "model")
    finished(*small)
    folder = [flag if flag != "tiny:llama" else "model" for flag in small[:-1]]
    result = nmbench("run", *folder, "folder")
    assert result.exit_code == 0, result.output
    values = [[row["metrics"] for row in records(tmp_path / name)] for name in ("out", "folder")]
    assert values[0] == values[1]


def test_json_lines_can_calibrate(nmbench, small, texts, records, tmp_path):
    """A JSON lines file with a "text" field is calibration text like any other."""
    paragraphs = (texts / "cal.txt").read_text(encoding="utf-8").split("\n\n")
    lines = [json.dumps({"text": f"\u2028{text}"}, ensure_ascii=False) for text in paragraphs]  # no line end in JSON
    (tmp_path / "cal.jsonl").write_text("\n".join(lines), encoding="utf-8")
    flags = [flag.replace(f"text:{texts}/cal.txt", f"jsonl:{tmp_path}/cal.jsonl") for flag in small]
    result = nmbench("run", *flags[: flags.index("--set")], "--method", "wanda", "--out", "out")
    assert result.exit_code == 0, result.output
    assert records(tmp_path / "out")[1]["calibration"].startswith("jsonl:")


def test_pruning_and_evaluation_may_use_different_dtypes(nmbench, small, records, tmp_path):
    """Weights pruned in bfloat16 can be measured in float32, and the record says both."""
    result = nmbench("run", *small, "--method", "wanda", "--dtype", "bfloat16", "--eval-dtype", "float32")
    assert result.exit_code == 0, result.output
    environment = records(tmp_path / "out")[0]["environment"]
    assert (environment["dtype"], environment["eval_dtype"]) == ("bfloat16", "float32")


def test_a_preset_is_resolved_in_the_record_and_explicit_options_beat_it(nmbench, small, records, tmp_path):
    """`--set maskpro.preset=paper` with explicit steps records the published values and the explicit ones."""
    settings = [
        "--set",
        "maskpro.preset=paper",
        "--set",
        "maskpro.pool_windows=32",
        "--set",
        "maskpro.window_tokens=64",
    ]
    result = nmbench("run", *small, *settings)
    assert result.exit_code == 0, result.output
    options = records(tmp_path / "out")[-1]["options"]
    assert options["learning_rate"] == 50.0
    assert options["normalise"] is False
    assert options["steps"] == 6
    assert options["pool_windows"] == 32


@pytest.mark.parametrize("init", [pytest.param("magnitude", marks=pytest.mark.slow), "sparsegpt"])
def test_a_learner_may_start_from_another_method(nmbench, small, records, tmp_path, init):
    """The initial mask is a choice, evaluated on frozen dense weights as a row of its own."""
    result = nmbench("run", *small, "--set", f"maskpro.init={init}", "--method", init)
    assert result.exit_code == 0, result.output
    rows = {row["label"]: row for row in records(tmp_path / "out")}
    assert rows["maskpro@init"]["method"] == init
    assert rows["maskpro@init"]["weights_changed"] is False
    assert rows["maskpro@init"]["proof"]["masks_digest"] == rows[init]["proof"]["masks_digest"]


def test_a_learner_may_start_from_a_refined_mask(nmbench, small, records, tmp_path):
    """A refined mask is an initial mask like any other: that of the refiner with its default options."""
    result = nmbench("run", *small, "--set", "maskpro.init=swaps", "--method", "swaps", "--method", "wanda")
    assert result.exit_code == 0, result.output
    rows = {row["label"]: row for row in records(tmp_path / "out")}
    assert list(rows) == ["dense", "maskpro@init", "maskpro", "swaps", "wanda"]  # none for what swaps starts from
    assert rows["maskpro@init"]["options"] == rows["swaps"]["options"]
    assert rows["maskpro@init"]["proof"]["masks_digest"] == rows["swaps"]["proof"]["masks_digest"]
    assert rows["swaps"]["proof"]["masks_digest"] != rows["wanda"]["proof"]["masks_digest"]
    assert 0 < rows["swaps"]["figures"]["error_fall"] < 1


def test_a_learner_may_start_from_another_learner(nmbench, small, records, tmp_path):
    """The masks of a row are the start of the next one, also when it is added later; what it gained is told."""
    first = ["--method", "short=maskpro", "--set", "short.steps=2", "--set", "short.select=false"]
    result = nmbench("run", *small, *first, "--set", "short.learning_rate=30", "--set", "maskpro.init=short")
    assert result.exit_code == 0, result.output
    rows = {row["label"]: row for row in records(tmp_path / "out")}
    assert list(rows) == ["dense", "short@init", "short", "maskpro"]
    assert [row["started_from"] for row in rows.values()] == [None, None, "short@init", "short"]
    assert rows["maskpro"]["cost"]["forward_tokens"] > rows["short"]["cost"]["forward_tokens"] > 0  # both learners'
    assert [rows[label]["cost"]["selection_tokens"] for label in ("short", "maskpro")] == [0, 1024]
    assert rows["short"]["proof"]["masks_digest"] != rows["short@init"]["proof"]["masks_digest"]
    assert "maskpro against its initial mask" in result.output
    later = ["--method", "kept=maskpro", "--set", "kept.init=short", "--set", "kept.steps=0"]
    result = nmbench("run", *small, *first, "--set", "short.learning_rate=30", "--set", "maskpro.init=short", *later)
    assert result.exit_code == 0, result.output
    more = records(tmp_path / "out")
    assert [row["label"] for row in more[4:]] == ["kept"]
    assert more[-1]["proof"]["masks_digest"] == rows["short"]["proof"]["masks_digest"]
    assert more[-1]["metrics"] == rows["short"]["metrics"]
    for kind in ("prune", "prune_cpu"):
        assert more[-1]["seconds"][kind] > rows["short"]["seconds"][kind] > 0


def test_shared_work_is_the_work_that_would_have_been_done(nmbench, small, records, tmp_path):
    """A row copied from another has the figures and files that it has when computed alone, and says of which."""
    several = ["--method", "b=wanda", "--set", "a.steps=2", "--method", "a=maskpro", "--method", "c=wanda"]
    result = nmbench("run", *small, *several)
    assert result.exit_code == 0, result.output
    rows = {row["label"]: row for row in records(tmp_path / "out")}
    assert [label for label, row in rows.items() if row["copied_from"]] == ["b", "a@init", "c"]
    assert {rows[label]["copied_from"] for label in ("b", "a@init", "c")} == {"maskpro@init"}
    alone = nmbench("run", *small[: small.index("--set")], "--method", "c=wanda", "--out", "alone")
    assert alone.exit_code == 0, alone.output
    row = records(tmp_path / "alone")[1]
    for name in ("metrics", "against_dense", "proof", "cost", "job_digest", "options", "measured_digest"):
        assert rows["c"][name] == row[name], name
    for kind in ("masks", "losses"):
        files = (tmp_path / out / kind / "c--2-4--seed0.safetensors" for out in ("out", "alone"))
        (copied, about), (computed, wanted) = map(read_tensors, files)
        assert about == wanted
        assert copied.keys() == computed.keys() and all(torch.equal(copied[name], computed[name]) for name in copied)
    names = ", ".join(f"{label} 2:4 seed 0" for label in ("b", "a@init", "c"))
    assert f"NOTE {names}: the same work as maskpro@init, done once" in result.output
    again = nmbench("run", *small, *several)
    assert again.exit_code == 0, again.output
    assert len(records(tmp_path / "out")) == len(rows)


MINE = """
import dataclasses
import nmbench


@dataclasses.dataclass(frozen=True)
class Mine(nmbench.Scorer):
    def score(self, weight, stats):
        return {sign}weight.abs()


@nmbench.hookimpl
def nmbench_register_baselines(register):
    register("mine", Mine)
"""


def test_changed_code_is_other_work(nmbench, small, records, tmp_path):
    """A plugin that was edited since the last run is run again, whatever its label, name and options."""
    for label, sign in (("v1", ""), ("v1", ""), ("v2", "-"), ("v1", "-")):
        (tmp_path / "mine.py").write_text(MINE.replace("{sign}", sign))
        plugin = ["--plugin", str(tmp_path / "mine.py"), "--method", f"{label}=mine", "--out", "out"]
        result = nmbench("run", *small[: small.index("--set")], *plugin)
        assert result.exit_code == 0, result.output
    first, second, third = records(tmp_path / "out")[1:]
    assert [row["label"] for row in (first, second, third)] == ["v1", "v2", "v1"]
    masks = [row["proof"]["masks_digest"] for row in (first, second, third)]
    assert masks[0] != masks[1] == masks[2]
    assert first["content"]["code"] != second["content"]["code"]


def test_a_plugin_file_is_found_from_anywhere(nmbench, small, records, tmp_path, monkeypatch):
    """A file that was named from its own folder is found when the run is repeated from another; where it lies is in no
    digest, so that a copy of it in another folder makes the same rows.
    """
    (tmp_path / "mine.py").write_text(MINE.replace("{sign}", ""))
    flags = [*small[: small.index("--set")], "--method", "mine"]
    assert nmbench("run", *flags, "--plugin", "mine.py", "--out", "out").exit_code == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    again = nmbench("run", "--config", "../out/spec.toml", "--out", "again")
    assert again.exit_code == 0, again.output
    (elsewhere / "mine.py").write_text(MINE.replace("{sign}", ""))
    assert nmbench("run", *flags, "--plugin", "mine.py", "--out", "copy").exit_code == 0
    rows = [records(folder) for folder in (tmp_path / "out", elsewhere / "again", elsewhere / "copy")]
    for name in ("job_digest", "spec_digest", "protocol_digest"):
        assert len({tuple(row[name] for row in found) for found in rows}) == 1, name


@pytest.mark.parametrize("texts_of", [("mask_only", "yes", "1"), ("damping", "0.01", "1e-2")])
def test_equal_options_are_equal_jobs(nmbench, small, records, tmp_path, texts_of):
    """However a value is written, it is the same value: the run directory takes it, and nothing is done again."""
    name, *written = texts_of
    for text in written:
        flags = [*small[: small.index("--set")], "--method", "mask=sparsegpt", "--set", f"mask.{name}={text}"]
        result = nmbench("run", *flags, "--out", "out")
        assert result.exit_code == 0, result.output
    assert [row["label"] for row in records(tmp_path / "out")] == ["dense", "mask"]
    spec = RunSpec.from_dict(read_toml(tmp_path / "out" / "spec.toml"))
    assert spec.methods[0].options == {name: True if name == "mask_only" else 0.01}


def test_a_broken_file_stops_the_command(nmbench, small, tmp_path):
    """A plugin file that cannot be loaded is an error with its stage and reason, and nothing is run without it."""
    (tmp_path / "broken.py").write_text("def 7\n")
    result = nmbench("run", *small[: small.index("--set")], "--method", "wanda", "--plugin", "broken.py")
    assert result.exit_code == 1
    assert "Error: plugin file broken.py failed at import: SyntaxError" in result.stderr
    assert "mend the file, or leave out --plugin" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_report_filters(nmbench, small, tmp_path):
    """`nmbench report` prints the rows of a label, pattern and seed beside dense; a choice without rows is refused."""
    flags = [*small[: small.index("--set")], "--method", "wanda", "--out", "out"]
    assert nmbench("run", *flags, "--seed", "0", "--seed", "1").exit_code == 0
    text = nmbench("report", "out", "--method", "wanda", "--seed", "1", "--pattern", "2:4").output
    rows = [line.split()[:3] for line in text.split("\n\n")[0].splitlines()]
    assert rows[1:] == [["dense", "-", "-"], ["wanda", "2:4", "1"]]
    refused = nmbench("report", "out", "--method", "acme")
    assert refused.exit_code == 1
    assert "Error: no row is of that pattern, label and seed; there are wanda 2:4 seed 0" in refused.stderr


def test_reports_go_where_they_are_told(nmbench, finished, small, tmp_path):
    """A report is written to a folder that does not exist yet; an unknown format writes nothing."""
    finished(*small[: small.index("--set")], "--method", "wanda", "--out", "out")
    result = nmbench("report", "out", "--format", "json", "--out", "new/folder")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "new/folder/report.json").exists()
    refused = nmbench("report", "out", "--format", "csv", "--format", "jsn", "--out", "other")
    assert refused.exit_code == 1
    assert not (tmp_path / "other").exists()


def test_any_one_shot_mask_can_be_refined(nmbench, small, records, tmp_path):
    """Swaps start from the mask of a scorer or a solver; each has a row and a digest of its own."""
    labels = [flag for name in ("magnitude", "sparsegpt") for flag in ("--method", f"{name[0]}=swaps")]
    settings = ["--set", "m.init=magnitude", "--set", "s.init=sparsegpt", "--set", "s.sequential=false"]
    result = nmbench("run", *small[: small.index("--set")], "--out", "out", *labels, *settings)
    assert result.exit_code == 0, result.output
    rows = records(tmp_path / "out")[1:]
    assert [row["options"]["init"] for row in rows] == ["magnitude", "sparsegpt"]
    assert [row["weights_changed"] for row in rows] == [False, False]
    assert len({row["proof"]["masks_digest"] for row in rows}) == 2


def test_each_aim_of_swaps_counts(nmbench, small, records, tmp_path):
    """Without a target, or with the first tokens, swaps find another mask; without the dense model they run fewer."""
    labels = [flag for name in "abcd" for flag in ("--method", f"{name}=swaps")]
    options = ["b.residual_weight=0", "c.skip_tokens=0", "d.residual_weight=0", "d.dense_weight=0"]
    settings = [flag for option in options for flag in ("--set", option)]
    result = nmbench("run", *small[: small.index("--set")], "--out", "out", *labels, *settings)
    assert result.exit_code == 0, result.output
    rows = records(tmp_path / "out")[1:]
    assert len({row["proof"]["masks_digest"] for row in rows}) == 4
    tokens = [row["cost"]["forward_tokens"] for row in rows]
    assert tokens[0] == tokens[2] > tokens[1] > tokens[3]


def test_windows_that_swaps_skip_altogether(nmbench, small):
    """A window of which no token is left fails the job, with its length."""
    result = nmbench("run", *small[: small.index("--set")], "--method", "swaps", "--set", "swaps.skip_tokens=999")
    assert result.exit_code == 1
    assert "swaps 2:4 seed 0: skip_tokens is 999, but calibration windows have" in result.output


@pytest.mark.parametrize(
    "family",
    [
        *("gpt2", "gemma3"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("opt", "gptneox", "gemma2", "qwen3", "phi3", "mistral")
        ),
    ],
)
def test_every_architecture_runs_end_to_end(nmbench, small, records, tmp_path, family):
    """Solver, scorer and refiner prune every family of small models, and the dense row is the same model."""
    flags = [flag.replace("tiny:llama", f"tiny:{family}") for flag in small[: small.index("--set")]]
    result = nmbench("run", *flags, "--out", "out", "--method", "wanda", "--method", "sparsegpt", "--method", "swaps")
    assert result.exit_code == 0, result.output
    assert [row["status"] for row in records(tmp_path / "out")] == ["ok"] * 4


def test_global_random_state_is_left_alone(nmbench, small):
    """A run neither uses nor disturbs the random state of its process."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert nmbench("run", *small).exit_code == 0
    assert torch.equal(torch.rand(3), expected)
