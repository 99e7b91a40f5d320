"""Laws of TensorBoard's files, read back with the library that wrote them: every figure of every row, by step."""

import struct
import sys

import pytest

from nmbench.plugins.events import Progress
from nmbench.results.results import load_results
from nmbench_plugins.publish.tensorboard import Follower, Tensorboard, tag
from reference.run_directory import TEXT, record_of, write_run

pytest.importorskip("tensorboardX", reason="tensorboardX, of the extra nmbench[tensorboard], is not installed")


def events(folder):
    """Every event of the files of a folder, in the order of the files: length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.suffix):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def scalars(folder):
    """Tag -> (step, value) of all figures."""
    found = {}
    for event in events(folder):
        for value in event.summary.value:
            if not value.tag.startswith("_hparams_"):
                found.setdefault(value.tag, []).append((event.step, pytest.approx(value.simple_value)))
    return found


def learner():
    curve = [{"step": 1, "loss": 3.5, "heldout": None}, {"step": 2, "loss": 3.25, "heldout": 3.0}]
    return record_of("learner", curve=curve, options={"steps": 2, "init": "wanda", "aim": None, "long": True})


def test_a_finished_run(tmp_path):
    """Each row has a folder with its curve, metrics and cost, and its options as hyperparameters; again is the same."""
    failed = {**record_of("bad"), "status": "failed", "metrics": {}, "error": "broken"}
    results = load_results(write_run(tmp_path / "a", [record_of("dense", None, None), learner(), failed]))
    for _ in range(2):
        path = Tensorboard().write(results, tmp_path / "a")
    assert sorted(folder.name for folder in path.iterdir()) == ["dense", "learner_2-4_seed_0"]
    row = path / "learner_2-4_seed_0"
    found = scalars(row)
    assert found["learn/loss"] == [(1, 3.5), (2, 3.25)]
    assert found["learn/heldout"] == [(2, 3.0)]
    assert found[tag(f"metric/ppl:{TEXT}")] == [(0, results.records[1]["metrics"][f"ppl:{TEXT}"]["value"])]
    assert found["cost/prune_seconds"] == [(0, 1.0)]
    plugin = b"".join(v.metadata.plugin_data.content for e in events(row) for v in e.summary.value)
    assert all(word in plugin for word in (b"option.init", b"wanda", b"option.steps", b"metric/ppl_plays_64"))


def test_a_run_that_goes_on(tmp_path):
    """Figures are on disk by step when the row is done, once; steps that a kill repeats hide those before."""
    follower = Follower()
    follower.nmbench_run_started(directory=tmp_path)
    for step in (1, 2):
        follower.nmbench_progress(Progress("learner 2:4 seed 0", "learn", step, 2, {"loss": 4.0 - step}))
    follower.close()
    follower.nmbench_progress(Progress("learner 2:4 seed 0", "learn", 2, 2, {"loss": 2.0}))
    follower.nmbench_method_finished(record=learner())
    follower.nmbench_method_finished(record=record_of("other", curve=[{"step": 7, "loss": 1.0}]))
    found = events(tmp_path / "tensorboard/learner_2-4_seed_0")
    assert [event.step for event in found if event.HasField("session_log")] == [2]
    assert scalars(tmp_path / "tensorboard/learner_2-4_seed_0")["learn/loss"] == [(1, 3.0), (2, 2.0), (2, 2.0)]
    assert scalars(tmp_path / "tensorboard/other_2-4_seed_0")["learn/loss"] == [(7, 1.0)]


def test_the_command(nmbench, finished, small, tmp_path, monkeypatch):
    """`--track tensorboard` follows a run; other reporters and a missing library are refused before it begins."""
    finished(*small, "--track", "tensorboard")
    found = scalars(tmp_path / "out/tensorboard/maskpro_2-4_seed_0")
    (record,) = (row for row in load_results(tmp_path / "out").records if row["label"] == "maskpro")
    name = next(name for name in record["curve"][0] if name != "step")
    steps = [point["step"] for point in record["curve"] if name in point]
    assert [step for step, _ in found[f"learn/{name}"]] == steps
    assert {tag(f"metric/{metric}") for metric in record["metrics"]} <= set(found)
    refused = nmbench("run", *small, "--out", "other", "--track", "csv")
    assert refused.exit_code == 1 and "reporter 'csv' does not follow a run" in refused.stderr
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    refused = nmbench("run", *small, "--out", "other", "--track", "tensorboard")
    assert refused.exit_code == 1 and "pip install 'nmbench[tensorboard]'" in refused.stderr
    assert not (tmp_path / "other").exists()
