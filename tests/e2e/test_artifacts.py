"""Results are exported and imported: validate, export, diff and import through the command line."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nmbench.artifacts.export import VESTIGES, export, read_back
from nmbench.artifacts.rebuilding import find_row
from nmbench.errors import CannotWrite, ModelChanged, NMBenchError, NotReproduced
from nmbench.plugins.loading import load_plugins
from nmbench.results.files import load_masks, save_masks
from nmbench.results.precision import printed
from nmbench.verification.strict import masks_digest
from nmbench_plugins.tiny import FAMILIES
from reference.perplexity import perplexity

EXPERTS = tuple(f"tiny:{family}" for family in FAMILIES if family in ("mixtral", "qwen3moe"))
SCORED = ("tiny:llama", "demo", EXPERTS[0])  # their weights stay dense
SOLVED = ("tiny:gpt2", "tiny:qwen3", EXPERTS[1])
LIKE_LLAMA = ("demo", "tiny:qwen3")
TOKENS = torch.arange(40)[None]


@pytest.fixture
def flags(texts):
    """Texts and lengths of a run that takes a second; any model."""
    lengths = ["--windows", "4", "--window-tokens", "64", "--pool-tokens", "2048", "--selection-tokens", "1024"]
    return ["--calibration", f"text:{texts}/cal.txt", "--metric", f"ppl:text:{texts}/test.txt@64", "--quiet", *lengths]


def value_of(record):
    (metric,) = record["metrics"].values()
    return metric["value"]


@pytest.fixture
def run(nmbench, finished, flags, records, tmp_path):
    """Run methods on a model; returns the rows by label. The first run of a test is done once for all tests."""

    def go(model, *arguments):
        given = ["--model", model, *flags, "--out", "out", *arguments]
        if (tmp_path / "out").exists():
            result = nmbench("run", *given)
            assert result.exit_code == 0, result.output
        else:
            finished(*given)
        return {row["label"]: row for row in records(tmp_path / "out")}

    return go


@pytest.mark.parametrize(
    ("model", "method"),
    [
        pytest.param(model, method, marks=[pytest.mark.slow] if model in LIKE_LLAMA else [])
        for models, method in ((SCORED, "wanda"), (SOLVED, "sparsegpt"))
        for model in models
    ],
)
def test_an_export_is_the_model_that_was_measured(run, nmbench, tmp_path, texts, model, method):
    """An export loaded with `from_pretrained` has the perplexity of its row, generates, and is strict."""
    row = run(model, "--method", method)[method]
    result = nmbench("export", "out", method, "--to", method)
    assert result.exit_code == 0, result.output
    assert "STRICT 2:4" in result.output and "coverage" in result.output
    assert perplexity(tmp_path / method, texts / "test.txt") == pytest.approx(value_of(row), rel=1e-5)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / method)
    assert loaded.generate(TOKENS, max_new_tokens=5, min_new_tokens=5).shape == (1, 45)
    config = json.loads((tmp_path / method / "config.json").read_text())
    assert not set(VESTIGES) & set(config)
    (tmp_path / "plain").touch()
    modes = {file.stat().st_mode for file in (tmp_path / method).rglob("*") if file.is_file()}
    assert modes == {(tmp_path / "plain").stat().st_mode}  # for others to read
    found = nmbench("validate", method, "--json")
    assert found.exit_code == 0
    content = json.loads(found.stdout)
    assert content["coverage"] == pytest.approx(row["coverage"]["share_of_decoder"])
    assert sum(layer["groups"] for layer in content["layers"]) == row["proof"]["groups"]
    masks = load_masks(tmp_path / method / "nmbench/masks.safetensors")
    assert masks_digest(masks) == row["proof"]["masks_digest"]


def test_an_export_has_the_logits_of_the_masked_model(run, nmbench, tmp_path):
    """An export has the logits of the dense model under the masks of the run directory, bit for bit."""
    from nmbench_plugins.tiny import TinyModel

    run("tiny:gpt2", "--method", "wanda")
    assert nmbench("export", "out", "wanda", "--to", "exported").exit_code == 0
    bundle = TinyModel().load("gpt2")
    for name, mask in load_masks(tmp_path / "out/masks/wanda--2-4--seed0.safetensors").items():
        stored = bundle.model.get_submodule(name).weight.data  # Conv1D: [in, out]
        stored.copy_(torch.where(mask.t(), stored, 0.0))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert torch.equal(model(TOKENS).logits, bundle.model(TOKENS).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert tokenizer("words, words")["input_ids"] == bundle.tokenizer("words, words")["input_ids"]


def test_rows_of_learners_and_other_dtypes(run, nmbench, tmp_path, texts, small):
    """A learner's masks, and the masks that it started from, are exported in the dtype of the run."""
    learner = small[small.index("--set") : small.index("--out")]
    rows = run("tiny:llama", "--dtype", "bfloat16", *learner)
    for label in ("maskpro", "maskpro@init"):
        result = nmbench("export", "out", label, "--to", f"{label}.model")
        assert result.exit_code == 0, result.output
    stored = safetensors.torch.load_file(tmp_path / "maskpro.model/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    measured = perplexity(tmp_path / "maskpro.model", texts / "test.txt")
    assert measured == pytest.approx(value_of(rows["maskpro"]), rel=1e-3)
    card = (tmp_path / "maskpro@init.model/README.md").read_text(encoding="utf-8")
    assert "--method maskpro" in card
    shares = json.loads(nmbench("diff", "out:maskpro", "maskpro.model", "--json").stdout)["total"]["shares"]
    assert set(shares.values()) == {1.0}


def test_the_command_of_a_row_that_starts_from_another(run, nmbench, tmp_path):
    """The command of a row also makes the rows that it starts from, with their options, and no other."""
    learners = ["--method", "b=maskpro", "--set", "b.init=a", "--method", "a=maskpro", "--set", "a.init=m"]
    steps = ["--set", "a.steps=1", "--set", "b.steps=1", "--set", "a.minibatch=2", "--set", "b.minibatch=2"]
    run("tiny:llama", *learners, *steps, "--method", "m=magnitude", "--method", "wanda")
    assert nmbench("export", "out", "b", "--to", "exported").exit_code == 0
    card = (tmp_path / "exported/README.md").read_text(encoding="utf-8")
    command = shlex.split(next(line for line in card.splitlines() if line.startswith("nmbench run")))
    methods = [value for flag, value in itertools.pairwise(command) if flag == "--method"]
    assert methods == ["b=maskpro", "a=maskpro", "m=magnitude"]


def test_the_card_and_its_command(run, nmbench, tmp_path, records):
    """The card has the figures of the record, the checksums of the files, and a command that makes the row again."""
    rows = run("tiny:llama", "--method", "s=sparsegpt", "--set", "s.damping=0.03", "--skip", "k_proj", "--seed", 3)
    assert nmbench("export", "out", "s", "--to", "exported").exit_code == 0
    card = (tmp_path / "exported/README.md").read_text(encoding="utf-8")
    figures = [printed(next(iter(rows[label]["metrics"].values()))) for label in ("dense", "s")]
    assert f"| {figures[0]} | {figures[1]} |" in card
    command = shlex.split(next(line for line in card.splitlines() if line.startswith("nmbench run")))
    result = nmbench(*command[1:], "--out", "repeated", "--quiet")
    assert result.exit_code == 0, result.output
    repeated = {row["label"]: row for row in records(tmp_path / "repeated")}["s"]
    for field in ("job_digest", "measured_digest", "proof", "metrics"):
        assert repeated[field] == rows["s"][field]
    for line in card.partition("## SHA-256")[2].split("\n- ")[1:]:
        name, digest = line.strip("` \n").split("` ")
        assert sha256(tmp_path / "exported" / name) == digest
    kept = json.loads((tmp_path / "exported/nmbench/record.json").read_text())
    assert kept["record"] == rows["s"] and kept["dense"] == rows["dense"]
    out = nmbench("validate", "exported").stdout
    assert "has no mask" in out and "STRICT" in out


def sha256(path):
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_checksums(run, nmbench, tmp_path):
    """A changed weight in a strict file fails its checksum; `--checksums` without recorded checksums exits with 3."""
    run("tiny:llama", "--method", "wanda")
    assert nmbench("export", "out:wanda:2:4:0", "--to", "exported").exit_code == 0
    result = nmbench("validate", "exported", "--checksums")
    assert result.exit_code == 0 and "checksums as they were written" in result.stdout
    path = tmp_path / "exported/model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 2
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    assert nmbench("validate", "exported").exit_code == 0
    result = nmbench("validate", "exported", "--checksums")
    assert result.exit_code == 1 and "CHANGED since it was written: model.safetensors" in result.stdout
    assert json.loads(nmbench("validate", "exported", "--checksums", "--json").stdout)["changed_files"] == [path.name]
    result = nmbench("validate", "out:wanda", "--checksums")
    assert result.exit_code == 3 and "has no checksums" in result.stderr


def test_export_refuses(run, nmbench, tmp_path):
    """An existing target, an unknown row and an ambiguous row each give one line, and no folder is left."""
    run("tiny:llama", "--method", "wanda", "--pattern", "2:4", "--pattern", "4:8")
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.iterdir())
    for arguments, expected in (
        (("wanda", "--to", "there", "--pattern", "2:4"), "there exists; give another folder"),
        (("wnda", "--to", "new"), "unknown row 'wnda' in out. Did you mean 'wanda'?"),
        (
            ("wanda", "--to", "new"),
            "several rows for wanda; choose by --pattern and --seed from 2:4 seed 0, 4:8 seed 0",
        ),
        (("--to", "new"), "out names no row; give RUN_DIRECTORY:LABEL"),
        (("wanda", "--to", "new", "--seed", "7"), "no such row for wanda"),
        (("wanda", "--to", "new", "--pattern", "2:4:6"), "not of the form N:M"),
    ):
        result = nmbench("export", "out", *arguments)
        assert result.exit_code == 1
        assert expected in result.stderr
        assert "\n" not in result.stderr.strip()
    assert sorted(tmp_path.iterdir()) == before


def edited(path, old, new):
    content = path.read_text(encoding="utf-8")
    assert old in content
    path.write_text(content.replace(old, new), encoding="utf-8")


def test_what_is_not_what_was_measured_is_not_exported(run, tmp_path, texts):
    """Another dense model, other masks, options or texts raise an error that names the change; no folder is left."""
    text = shutil.copy(texts / "cal.txt", tmp_path)
    methods = ["--method", "sparsegpt", "--set", "sparsegpt.damping=0.5", "--method", "wanda"]
    rows = run("tiny:llama", *methods, "--calibration", f"text:{text}")
    out = tmp_path / "out"

    def refused(label, error, message):
        with pytest.raises(error, match=message):
            export(find_row(out, label), tmp_path / "new", load_plugins())
        assert not list(tmp_path.glob("*new*")) and not list(tmp_path.glob(".*new*"))

    edited(out / "records.jsonl", rows["wanda"]["measured_digest"], "0" * 64)
    refused("wanda", NotReproduced, "weights of wanda 2:4 seed 0 are not those that were measured")
    masks = out / "masks/wanda--2-4--seed0.safetensors"
    masks.write_bytes((out / "masks/sparsegpt--2-4--seed0.safetensors").read_bytes())
    refused("wanda", NotReproduced, "the masks of wanda 2:4 seed 0 are not those")
    edited(tmp_path / "cal.txt", "e", "%")
    refused("sparsegpt", NotReproduced, "sparsegpt 2:4 seed 0 cannot be repeated")
    edited(tmp_path / "cal.txt", "%", "e")
    edited(out / "spec.toml", "damping = 0.5", "damping = 0.4")
    refused("sparsegpt", NotReproduced, "sparsegpt 2:4 seed 0 cannot be repeated")
    edited(out / "manifest.json", rows["wanda"]["environment"]["torch"], "x")
    edited(out / "spec.toml", 'model = "tiny:llama"', 'model = "tiny:qwen3"')
    refused("wanda", ModelChanged, "model tiny:qwen3 does not hold the weights")


def test_an_export_that_fails_leaves_nothing(run, tmp_path):
    """If reading back shows a difference, or the disk is full, no folder is left, whole or half."""
    run("tiny:llama", "--method", "wanda")
    row, plugins = find_row(tmp_path / "out", "wanda"), load_plugins()

    def altered(folder, bundle, pruned):
        norm = bundle.model.get_submodule("model.norm").weight
        norm.data[0] = -0.0  # a difference in one bit of one weight
        path = folder / "model.safetensors"
        weights = safetensors.torch.load_file(path)
        weights["model.norm.weight"][0] = 0.0
        safetensors.torch.save_file(weights, path, {"format": "pt"})
        return read_back(folder, bundle, pruned)

    def full(folder, bundle, pruned):
        raise OSError(28, "No space left on device")

    for check, error, message in (
        (altered, NMBenchError, r"model\.norm\.weight differs from the model after writing"),
        (full, CannotWrite, "No space left"),
    ):
        with pytest.raises(error, match=message):
            export(row, tmp_path / "new", plugins, check=check)
        assert not list(tmp_path.glob("*new*")) and not list(tmp_path.glob(".*new*"))


def test_published_masks_become_rows(run, nmbench, tmp_path, records):
    """The masks of a row, imported from every format, give the figures of that row."""
    rows = run("tiny:llama", "--method", "wanda")
    masks = load_masks(tmp_path / "out/masks/wanda--2-4--seed0.safetensors")
    np.savez_compressed("m.npz", **{f"{name}.weight.mask": np.packbits(mask) for name, mask in masks.items()})
    bits = {f"{name}.weight": np.packbits(mask) for name, mask in masks.items()}
    np.savez_compressed("p.npz", **bits, **{f"{name}.weight.__shape__": mask.shape for name, mask in masks.items()})
    (tmp_path / "folder").mkdir()
    for name, mask in masks.items():
        torch.save(mask, tmp_path / "folder" / f"{name}.pt")
    assert nmbench("export", "out", "wanda", "--to", "exported").exit_code == 0
    safetensors.torch.save_file(
        safetensors.torch.load_file("exported/model.safetensors"), "sparse.safetensors"
    )  # without masks
    paths = {
        "npz": "m.npz",
        "shapes": "p.npz",
        "pt": "folder",
        "row": "out:wanda",
        "export": "exported",
        "sparse": "sparse.safetensors",
    }
    asked = [
        piece
        for label, path in paths.items()
        for piece in ("--method", f"{label}=import", "--set", f"{label}.path={path}")
    ]
    again = run("tiny:llama", *asked)
    for label in paths:
        assert again[label]["metrics"] == rows["wanda"]["metrics"]
        assert again[label]["proof"]["masks_digest"] == rows["wanda"]["proof"]["masks_digest"]
        known = rows["wanda"]["cost"]["forward_tokens"] if label == "row" else None  # a row brings its cost along
        assert again[label]["cost"]["forward_tokens"] == known
        assert again[label]["notes"]["imported"]["form"]
    assert again["sparse"]["notes"]["imported"]["groups_filled"] == 0


def test_repaired_weights_come_back(run, nmbench, tmp_path):
    """An exported SparseGPT row, imported with its weights, has the same perplexity and can be exported again."""
    rows = run("tiny:gpt2", "--method", "sparsegpt")
    assert nmbench("export", "out", "sparsegpt", "--to", "exported").exit_code == 0
    (tmp_path / "sparse").mkdir()
    for name in ("model.safetensors", "config.json"):  # without the masks
        (tmp_path / "sparse" / name).write_bytes((tmp_path / "exported" / name).read_bytes())
    asked = ["--method", "again=import", "--set", "again.path=sparse", "--method", "masks=import"]
    asked += ["--set", "masks.path=exported", "--set", "masks.weights=true"]
    again = run("tiny:gpt2", *asked, "--set", "again.weights=true")
    for label in ("again", "masks"):
        assert again[label]["weights_changed"] is True
        assert again[label]["metrics"] == rows["sparsegpt"]["metrics"]
        assert again[label]["notes"]["imported"]["kept_weights_unlike_dense"] > 0
    assert "groups_filled" not in again["masks"]["notes"]["imported"]
    result = nmbench("export", "out", "again", "--to", "second")
    assert result.exit_code == 0, result.output
    first, second = (safetensors.torch.load_file(f"{name}/model.safetensors") for name in ("exported", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_changed_file_is_another_job(run, nmbench, tmp_path):
    """After the imported file has changed, the same command makes the row again with the new masks."""
    run("tiny:llama", "--method", "wanda", "--method", "magnitude")
    for source in ("wanda", "magnitude"):
        (tmp_path / "m.safetensors").write_bytes(
            (tmp_path / f"out/masks/{source}--2-4--seed0.safetensors").read_bytes()
        )
        rows = run("tiny:llama", "--method", "m=import", "--set", "m.path=m.safetensors")
        assert rows["m"]["proof"] == rows[source]["proof"]


def test_import_without_a_file(nmbench, flags):
    """An import without a path, or with a missing path, is an error before anything is computed."""
    for setting, expected in (
        ((), "give --set LABEL.path=PATH"),
        (("--set", "import.path=nothing"), "nothing does not exist"),
    ):
        result = nmbench("run", "--model", "tiny:llama", *flags, "--method", "import", *setting)
        assert result.exit_code == 1
        assert expected in result.stderr


def test_validate_exit_status(run, nmbench, tmp_path):
    """The exit status is 0 for strict, 1 for not strict with the group named, 3 for not judged, 2 for wrong usage."""
    run("tiny:llama", "--method", "wanda")
    assert nmbench("validate", "out:wanda").exit_code == 0
    assert nmbench("validate", "out:wanda", "--pattern", "1:4").exit_code == 1
    path = tmp_path / "out/masks/wanda--2-4--seed0.safetensors"
    masks = load_masks(path)
    name = list(masks)[3]
    from nmbench.pattern import Pattern

    masks[name][5, 9] ^= True
    save_masks(tmp_path / "broken.safetensors", masks, dict.fromkeys(masks, Pattern(2, 4)), {})
    result = nmbench("validate", "broken.safetensors")
    assert result.exit_code == 1
    assert f"{name}: 1 of" in result.stdout and "first: row 5, columns 8..11 keep" in result.stdout
    path.write_bytes(path.read_bytes()[:-7])
    result = nmbench("validate", path)
    assert (result.exit_code, result.stdout) == (3, "")
    assert "not a whole safetensors file" in result.stderr
    for what in ("nothing", "out", "out:magnitude"):
        assert nmbench("validate", what).exit_code == 3
    assert "out:wanda--2-4--seed0" in nmbench("validate", "out").stderr
    result = nmbench("validate", path, "--pattern", "4:2")
    assert result.exit_code == 2 and "pattern 4:2 is impossible" in result.stderr


HELP = """
import sys
from nmbench.cli import main
for command in sys.argv[1:]:
    main([command, "--help"], standalone_mode=False)
    assert "torch" not in sys.modules, command
"""


def test_help_needs_no_torch():
    """The help of every command prints without importing torch."""
    commands = ["validate", "diff", "export"]
    done = subprocess.run([sys.executable, "-c", HELP, *commands], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage") == len(commands)


WATCHED = """
import sys, threading, time, torch
from nmbench.artifacts.reading import open_artifact
from nmbench.artifacts.validation import validate
def memory():  # private to the process: not the pages of a mapped file, which the system takes back when it needs them
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
def watch():
    while True:
        seen.append(memory())
        time.sleep(0.002)
torch.set_num_threads(1)
validate(open_artifact(sys.argv[1]))
seen = [memory()]
threading.Thread(target=watch, daemon=True).start()
found = validate(open_artifact(sys.argv[2]))
print(found.strict, found.bytes, len(seen), max(seen) - seen[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_validation_takes_little_memory(python, tmp_path, suffix):
    """A file of 128 MB is judged with 48 MB of memory beyond what a tiny file takes."""
    save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
    mask = torch.tensor([True, True, False, False]).repeat(2048, 512)
    save({"model.layers.0.a.weight": mask[:4, :16].half().contiguous()}, tmp_path / f"small.{suffix}")
    save({f"model.layers.{i}.a.weight": mask.half().clone() for i in range(16)}, tmp_path / f"large.{suffix}")
    paths = [str(tmp_path / f"{name}.{suffix}") for name in ("small", "large")]
    done = python.run("-c", WATCHED, *paths)
    assert done.returncode == 0, done.stderr
    strict, size, looks, more = done.stdout.split()
    assert (strict, int(size)) == ("True", 16 * 2 * mask.numel())
    assert int(looks) > 10
    assert int(more) < 48 * 2**20
