"""Laws of the run directory: durable records, resuming and extending, refusing what does not belong together."""

import dataclasses
import errno
import json
import os
import shlex
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.errors import NMBenchError, RunMismatch
from nmbench.pattern import Pattern
from nmbench.plain_data import read_toml
from nmbench.results.directory import RunDirectory
from nmbench.results.extending import merged, same
from nmbench.results.files import write_atomic, write_tensors
from nmbench.results.format import ADDED, NO_CPU
from nmbench.results.records import newest
from nmbench.results.results import Results, load_results
from nmbench.spec import Defaults, MethodSpec, RunSpec
from nmbench.testing.strategies import patterns

quick = settings(max_examples=24, deadline=None)
MANIFEST = {
    "model_digest": "m1",
    "test_digests": {"demo": "t1"},
    "calibration_digests": {"0": "c0"},
    "calibration_notes": {"0": "drawn"},
}
PROTOCOL = {
    "model": "tiny:llama",
    "skip": ("q_proj",),
    "calibration": "wikitext2",
    "windows": 7,
    "window_tokens": 9,
    "pool_tokens": 12345,
    "selection_tokens": 77,
    "metrics": ("ppl:demo@16",),
    "dtype": "bfloat16",
    "eval_dtype": "float64",
}

values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@st.composite
def records(draw):
    """A record of some job, with content of any kind."""
    return {
        "format": 2,
        "label": draw(st.sampled_from(["dense", "wanda", "acme"])),
        "pattern": draw(st.sampled_from([None, "2:4", "1:4"])),
        "seed": draw(st.sampled_from([None, 0, 1])),
        "job_digest": draw(st.sampled_from(["j1", "j2"])),
        "status": draw(st.sampled_from(["ok", "failed"])),
        **{"metrics": {}, "seconds": dict(NO_CPU), "cost": {}, **ADDED},
        "notes": draw(st.dictionaries(st.text(), values | st.lists(values), max_size=3)),
    }


def record(label="wanda", seed=0, seconds=None, **others):
    """A record as it is read; `seconds`: those that its line holds."""
    return {
        "format": 2,
        "label": label,
        "pattern": "2:4",
        "seed": seed,
        "job_digest": f"{label}{seed}",
        "status": "ok",
        **{"notes": {}, "metrics": {}, "seconds": {**NO_CPU, **(seconds or {})}, "cost": {}, **ADDED},
        **others,
    }


def spec_of(*labels, **others):
    """A resolved spec of methods named by label, magnitude each."""
    methods = tuple(MethodSpec(label, "magnitude") for label in labels or ("wanda",))
    return dataclasses.replace(RunSpec(methods).resolved(Defaults(metrics=("ppl:demo@8",))), **others)


def refusal(call, *args, error=RunMismatch):
    """The text of an error, which is one line."""
    with pytest.raises(error) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def content_of(path):
    """Every file below a folder with its bytes, but for the lock."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.name != ".lock"}


@pytest.fixture
def directory(tmp_path):
    """An open run directory."""
    with RunDirectory(tmp_path / "runs" / "out") as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One run directory for all examples of a law."""
    return RunDirectory(tmp_path_factory.mktemp("out"))


def as_lines(lines):
    """The bytes of a records file."""
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


# Records


@quick
@given(st.lists(records(), min_size=1, max_size=6))
def test_records_are_read_as_they_were_written(folder, lines):
    """A records file has one line a record, in order, and reading it gives the newest record of every row."""
    folder.records_path.unlink(missing_ok=True)
    for line in lines:
        folder.append(line)
    assert folder.records_path.read_bytes() == as_lines(lines)
    assert folder.records() == newest(lines)
    assert load_results(folder.path).records == folder.records()


@quick
@given(st.lists(records(), max_size=12))
def test_newest_record_wins(lines):
    """Of the records of one row the last counts; rows stand in the order of their first records."""
    rows = [(line["label"], line["pattern"], line["seed"]) for line in lines]
    last = dict(zip(rows, lines, strict=True))
    assert newest(lines) == [last[row] for row in dict.fromkeys(rows)]
    assert newest(newest(lines)) == newest(lines)


@quick
@given(st.lists(records(), max_size=3), records(), records(), st.data())
def test_torn_last_line_is_repaired(folder, earlier, last, new, data):
    """Cut off at any byte of its last line, a records file loses that record at most, and takes new ones as ever."""
    line = len(json.dumps(last)) + 1
    for cut in {data.draw(st.integers(0, line)), line - 1}:  # bytes left of the last line
        folder.records_path.write_bytes(as_lines([*earlier, last])[: len(as_lines(earlier)) + cut])
        whole = [*earlier, last] if cut >= line - 1 else earlier  # only the line break is missing
        check_repair(folder, whole, new)


def check_repair(folder, whole, new):
    """A torn file holds the records `whole`, and after repair takes a new one."""
    assert folder.records() == newest(whole)  # reading alone, as a report does, needs no repair
    folder.repair()
    assert folder.records() == newest(whole)
    folder.append(new)
    assert folder.records() == newest([*whole, new])
    before = folder.records_path.read_bytes()
    folder.repair()
    assert folder.records_path.read_bytes() == before


@quick
@given(st.lists(records(), min_size=2, max_size=5), st.data())
def test_broken_whole_line_is_an_error(folder, lines, data):
    """A line with its line break that is not JSON is an error naming file, line and remedy: no row is dropped."""
    number = data.draw(st.integers(1, len(lines)))
    written = as_lines(lines).splitlines()
    written[number - 1] = written[number - 1][: data.draw(st.integers(1, len(written[number - 1]) - 1))]
    folder.records_path.write_bytes(b"\n".join(written) + b"\n")
    text = refusal(folder.records, error=NMBenchError)
    assert f"records.jsonl line {number} is not a JSON object; remove it" in text
    assert refusal(load_results, folder.path, error=NMBenchError) == text


def test_record_is_on_disk_before_anyone_is_told(directory, monkeypatch):
    """Appending writes the whole line, and then syncs the file."""
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (real(file), synced.append(directory.records_path.read_bytes())))
    directory.append(record())
    assert [json.loads(line) for line in synced[:1]] == [record()]


def test_full_disk_is_one_line(directory, monkeypatch):
    """A disk that refuses a record gives an error of one line that names the file."""

    def refuse(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    assert "records.jsonl: No space left on device" in refusal(directory.append, record(), error=NMBenchError)


def test_record_that_is_not_json_is_not_written(directory):
    """A record with a NaN, which other readers of JSON refuse, never reaches the file."""
    directory.append(record())
    with pytest.raises(ValueError, match="not JSON compliant"):
        directory.append(record(seed=1, loss=float("nan")))
    assert directory.records() == [record()]


def test_finished_is_what_ended_well(directory):
    """A job is finished if its newest record says ok and its files are there; anything else is done again."""
    for name in ("wanda", "magnitude"):
        write_tensors(directory.file("losses", name, ".safetensors"), {}, {})
    directory.append(record("wanda", status="failed", strict=None))
    directory.append(record("magnitude", strict=None))
    assert directory.finished("wanda0", "wanda") is None
    assert directory.finished("magnitude0", "magnitude") == record("magnitude", strict=None)
    assert directory.finished("magnitude0", "gone") is None
    assert directory.finished("unknown", "magnitude") is None
    directory.append(record("wanda", seconds={"prune": 2}, strict=True))
    assert directory.finished("wanda0", "wanda") is None  # it speaks of masks
    write_tensors(directory.file("masks", "wanda", ".safetensors"), {}, {})
    assert directory.finished("wanda0", "wanda") == record("wanda", seconds={"prune": 2}, strict=True)


@pytest.mark.parametrize("kind", ["losses", "masks", "weights"])
def test_a_job_with_a_damaged_file_is_not_finished(directory, capsys, kind):
    """One flipped bit in a file of a job: the job is done again, and a notice names the file."""
    paths = [directory.file(name, "wanda", ".safetensors") for name in ("losses", "masks", "weights")]
    for path in paths:
        write_tensors(path, {"a": torch.arange(10)}, {})
    directory.append(record("wanda", strict=True))
    assert directory.finished("wanda0", "wanda")
    damaged = directory.file(kind, "wanda", ".safetensors")
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    assert directory.finished("wanda0", "wanda") is None
    assert f"NOTICE cannot read {damaged}: it is damaged." in capsys.readouterr().err


def test_what_killed_writes_left_is_swept(directory):
    """Temporary files of an earlier process are removed when a run begins; every other file stays."""
    for kind in ("losses", "checkpoints"):
        left = directory.file(kind, "wanda", ".safetensors").with_name(f".wanda.safetensors.{'0123456789abcdef' * 2}")
        write_atomic(left, b"half")
        write_atomic(left.with_name(".hidden"), b"of the user")
    directory.adopt(spec_of(), MANIFEST)
    hidden = (str(path.relative_to(directory.path)) for path in directory.path.glob("*/.*"))
    assert sorted(hidden) == [
        "checkpoints/.hidden",
        "losses/.hidden",
    ]


def test_the_first_record_survives_a_power_cut(directory, monkeypatch):
    """The name of a new records file is durable as well: its folder is synced after the file."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.path.isdir(f"/proc/self/fd/{number}")))
    directory.append(record())
    directory.append(record(seed=1))
    assert synced == [False, True, False]


# Adopting and extending


def test_adopt_then_resume_changes_nothing(directory):
    """Giving the same spec again leaves every file of the directory byte for byte, records too."""
    directory.adopt(spec_of(), MANIFEST)
    directory.append(record())
    before = content_of(directory.path)
    directory.adopt(spec_of(), MANIFEST)
    assert content_of(directory.path) == before
    assert sorted(before) == ["manifest.json", "records.jsonl", "spec.toml"]


@quick
@given(
    patterns(),
    st.sets(st.integers(0, 9), min_size=1),
    st.dictionaries(st.sampled_from("ab"), st.integers() | st.text()),
)
def test_spec_file_is_the_spec(folder, pattern, seeds, options):
    """The spec read from the directory is the spec that was run, with the same digests; its first line repeats it."""
    path = folder.path / "spec.toml"
    path.unlink(missing_ok=True)
    folder.records_path.unlink(missing_ok=True)
    spec = dataclasses.replace(spec_of("acme", "wanda"), patterns=(pattern,), seeds=tuple(seeds))
    spec = dataclasses.replace(spec, methods=(MethodSpec("new", "acme", options), *spec.methods))
    folder.adopt(spec, MANIFEST)
    found = RunSpec.from_dict(read_toml(path))
    assert found.resolved(Defaults()) == spec
    assert (found.digest, found.protocol_digest) == (spec.digest, spec.protocol_digest)
    assert f"nmbench run --config {path} --out {folder.path}" in path.read_text().splitlines()[0]


def test_spec_file_says_from_where(tmp_path, monkeypatch):
    """The line that repeats a run can be pasted whatever its folder is called; the third says where paths begin."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with RunDirectory(tmp_path / "my run; ls") as directory:
        directory.adopt(spec_of("wanda"), MANIFEST)
    lines = (tmp_path / "my run; ls" / "spec.toml").read_text().splitlines()
    words = shlex.split(lines[0].partition(": ")[2])
    assert words[-1] == str(tmp_path / "my run; ls") and words[-3] == str(tmp_path / "my run; ls" / "spec.toml")
    assert str(tmp_path / "work") in lines[2]


@pytest.mark.parametrize(
    ("before", "now", "equal"),
    [
        ({"a": "500"}, {"a": 500}, True),
        ({"a": 500}, {"a": "500"}, True),
        ({"a": "2"}, {"a": 2.0}, True),
        ({"a": "yes"}, {"a": True}, True),
        ({"a": "none"}, {"a": "none"}, True),
        ({"a": "yes"}, {"a": False}, False),
        ({"a": "many"}, {"a": 500}, False),
        ({"a": 1}, {}, False),
        ({"a": 1}, {"b": 1}, False),
    ],
)
def test_options_are_compared_as_values(before, now, equal):
    """A directory that holds an option as text takes the same option as a value, and the other way round."""
    assert same(before, now) == equal


@st.composite
def specs(draw):
    """Specs of one protocol."""
    labels = draw(st.lists(st.sampled_from("abcd"), min_size=1, unique=True))
    chosen = draw(st.lists(st.sampled_from([Pattern(2, 4), Pattern(4, 8), Pattern(1, 4)]), min_size=1, unique=True))
    seeds = draw(st.lists(st.integers(0, 5), min_size=1, unique=True))
    files = draw(st.lists(st.sampled_from(["x.py", "y.py"]), unique=True))
    return spec_of(*labels, patterns=tuple(chosen), seeds=tuple(seeds), plugins=tuple(files))


@quick
@given(specs(), specs())
def test_extending_keeps_everything(folder, earlier, now):
    """Joining two specs of one protocol holds the methods, patterns, seeds and plugins of both, the earlier first."""
    both = merged(earlier, now, folder.path, "ab")
    for name in ("methods", "patterns", "seeds", "plugins"):
        before, after, joined = (getattr(spec, name) for spec in (earlier, now, both))
        assert joined[: len(before)] == before
        assert (
            sorted(set(map(str, joined))) == sorted(map(str, joined)) == sorted({*map(str, before), *map(str, after)})
        )
    assert both.protocol_digest == earlier.protocol_digest
    assert merged(both, now, folder.path, "ab") == merged(both, earlier, folder.path, "ab") == both


def test_directory_grows(directory):
    """A directory adopted for more methods and seeds holds them all, and its records stay."""
    directory.adopt(spec_of("wanda"), MANIFEST)
    directory.append(record())
    later = {**MANIFEST, "calibration_digests": {"1": "c1"}, "calibration_notes": {"1": "drawn"}}
    directory.adopt(spec_of("acme", seeds=(1,)), later)
    held = read_toml(directory.path / "spec.toml")
    assert (list(held["methods"]), held["seeds"]) == (["wanda", "acme"], [0, 1])
    manifest = json.loads((directory.path / "manifest.json").read_text())
    assert manifest["calibration_digests"] == {"0": "c0", "1": "c1"}
    assert directory.records() == [record()]


@pytest.mark.parametrize("name", PROTOCOL)
def test_other_protocol_is_refused(directory, name):
    """A spec that differs in any part of the protocol is refused with both values, and nothing is changed."""
    directory.adopt(spec_of(), MANIFEST)
    directory.append(record())
    before = content_of(directory.path)
    other = spec_of(**{name: PROTOCOL[name]})
    assert other.protocol_digest != spec_of().protocol_digest
    text = refusal(directory.adopt, other, MANIFEST)
    for spec in (spec_of(), other):
        shown = spec.protocol()[name]
        assert repr(shown) in text
    assert f"{name} was " in text
    assert text.endswith("Give another --out.")
    assert content_of(directory.path) == before


def test_every_difference_is_shown(directory):
    """All differences of a refused spec are named at once."""
    directory.adopt(spec_of(), MANIFEST)
    text = refusal(
        directory.adopt, spec_of(windows=3, model="tiny:gpt2", pattern_for=(("mlp.*", Pattern(4, 8)),)), MANIFEST
    )
    assert "windows was 128, now 3" in text
    assert "model was 'demo', now 'tiny:gpt2'" in text
    assert "pattern_for was {}" in text


@pytest.mark.parametrize("method", [MethodSpec("wanda", "acme"), MethodSpec("wanda", "magnitude", {"steps": 3})])
def test_label_cannot_change_its_meaning(directory, method):
    """A label that stood for another method or other options is refused; another label is the remedy."""
    directory.adopt(spec_of(), MANIFEST)
    directory.append(record())
    text = refusal(directory.adopt, spec_of(methods=(method,)), MANIFEST)
    assert "label 'wanda' was magnitude with default options, now " in text
    assert f"--method wanda2={method.name}" in text


def test_label_without_a_row_is_free(directory):
    """As long as no row bears a label, it may still change its method and options."""
    directory.adopt(spec_of(), MANIFEST)
    directory.adopt(spec_of(methods=(MethodSpec("wanda", "magnitude", {"steps": 3}),)), MANIFEST)
    assert read_toml(directory.path / "spec.toml")["methods"]["wanda"]["options"] == {"steps": 3}


def test_options_from_flags_and_files_are_the_same(directory):
    """500 in a file is "500" on the command line: the same option, no difference."""
    both = [{"steps": 500, "fast": True, "lr": 0.5}, {"steps": "500", "fast": "true", "lr": "0.5"}]
    for options in both:
        directory.adopt(spec_of(methods=(MethodSpec("acme", "acme", options),)), MANIFEST)
        directory.append(record("acme"))
    assert read_toml(directory.path / "spec.toml")["methods"]["acme"]["options"] == both[0]


@pytest.mark.parametrize(("name", "value", "shown"), [
    ("model_digest", "m2", "model_digest differs"),
    ("test_digests", {"demo": "t2"}, "test_digests differs"),
    ("calibration_digests", {"0": "c9"}, "calibration tokens of seed 0 differ"),
    ("calibration_digests", {"1": "c1", "0": "c9"}, "calibration tokens of seed 0 differ"),
])  # fmt: skip
def test_other_content_under_the_same_names_is_refused(directory, name, value, shown):
    """Other weights, test tokens or calibration tokens under the same names are refused, and nothing is changed."""
    directory.adopt(spec_of(), MANIFEST)
    directory.adopt(spec_of(seeds=(1,)), {**MANIFEST, "calibration_digests": {"1": "c1"}})
    before = content_of(directory.path)
    text = refusal(directory.adopt, spec_of(), {**MANIFEST, name: value})
    assert shown in text
    assert "give another --out" in text
    assert content_of(directory.path) == before


def test_records_without_a_spec_are_refused(directory):
    """Records that nobody can say the spec of are not adopted."""
    directory.append(record())
    assert "has records but no spec.toml" in refusal(directory.adopt, spec_of(), MANIFEST)


def test_adopting_repairs(directory):
    """Resuming after a kill drops the torn line, so that the next record stands on a line of its own."""
    directory.adopt(spec_of(), MANIFEST)
    directory.append(record())
    with directory.records_path.open("ab") as file:
        file.write(b'{"label": "wan')
    directory.adopt(spec_of(), MANIFEST)
    directory.append(record(seed=1))
    assert directory.records() == [record(), record(seed=1)]


# The lock


HOLDER = """
import sys, pathlib, time
from nmbench.results.directory import RunDirectory
with RunDirectory(pathlib.Path(sys.argv[1])):
    pathlib.Path(sys.argv[1], "locked").touch()
    time.sleep(600)
"""


def test_one_run_at_a_time(python, tmp_path):
    """A directory that another process writes to is refused in one line; a killed process leaves no lock behind."""
    other = python.start("-c", HOLDER, str(tmp_path))
    other.wait_for(tmp_path / "locked")
    text = refusal(RunDirectory(tmp_path).__enter__, error=NMBenchError)
    assert text == f"another nmbench run is writing to {tmp_path}; wait for it or give another --out."
    other.send_signal(signal.SIGKILL)
    other.communicate()
    with RunDirectory(tmp_path) as directory:
        directory.append(record())
    assert directory.records() == [record()]


def test_a_file_is_no_directory(tmp_path):
    """An --out that is a file is an error of one line that names it."""
    (tmp_path / "out").write_text("I am a file")
    assert f"cannot write {tmp_path / 'out'}" in refusal(RunDirectory(tmp_path / "out").__enter__, error=NMBenchError)


# Reading


def test_load_results_joins_directories(tmp_path):
    """Rows of several directories stand one after another, each directory's own newest ones."""
    late = {"total": 2.0}
    for name in ("a", "b"):
        with RunDirectory(tmp_path / name) as directory:
            directory.append(record(seconds={"total": 1.0}))
            directory.append(record(seconds=late, at=name))
    results = load_results(str(tmp_path / "a"), tmp_path / "b")
    assert results.records == [record(seconds=late, at=name, directory=str(tmp_path / name)) for name in ("a", "b")]
    assert load_results(tmp_path / "a").records == [record(seconds=late, at="a")]
    assert results.directories == [tmp_path / "a", tmp_path / "b"]


@pytest.mark.parametrize("name", ["missing", ""])
def test_other_folder_is_no_run(tmp_path, name):
    """A folder without records, or that is missing, is an error that names it."""
    text = refusal(load_results, tmp_path / name, error=NMBenchError)
    assert text == f"{tmp_path / name} is not a run directory: it has no records.jsonl."


def test_frame_has_dotted_columns():
    """A frame has a row a job; a metric's value is in the column of its name, its other figures in dotted ones."""
    ppl = {"ppl:demo@8": {"value": 31.5, "stderr": 0.5, "n": 9, "lower_is_better": True}}
    first = record(metrics=ppl, seconds={"prune": 1.5, "total": 2.5}, cost={"forward_tokens": 64}, options={"steps": 3})
    first["peak_bytes"] = {"host": 1, "device": None}
    frame = Results([first, record(seed=1, status="failed", metrics={})], []).frame()
    assert len(frame) == 2
    shown = frame.loc[0, ["ppl:demo@8", "ppl:demo@8.stderr", "ppl:demo@8.n", "seconds.prune", "cost.forward_tokens"]]
    assert shown.tolist() == [31.5, 0.5, 9, 1.5, 64]
    assert frame["options.steps"].tolist()[0] == 3
    assert frame["label"].tolist() == ["wanda", "wanda"]
    assert frame["ppl:demo@8"].isna().tolist() == [False, True]
    assert "metrics" not in frame.columns
