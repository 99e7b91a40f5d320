"""Bad input: one clear line, exit status 1 (2 for wrong usage), no traceback, nothing written over."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch

MODEL = ["--model", "tiny:llama"]
LITTLE = ["--calibration", "text:long.txt", "--metric", "ppl:text:short.txt@8"]
CASES = {
    "unknown method": (
        ["--method", "magnitud"],
        1,
        ["unknown method 'magnitud'", "Did you mean 'magnitude'?", "wanda"],
    ),
    "unknown option": (
        ["--method", "maskpro", "--set", "maskpro.stepz=3"],
        1,
        ["unknown option 'stepz' of maskpro", "Did you mean 'steps'?"],
    ),
    "option of the wrong type": (
        ["--method", "maskpro", "--set", "maskpro.steps=many"],
        1,
        ["maskpro.steps must be int", "'many'"],
    ),
    "option out of range": (["--method", "maskpro", "--set", "maskpro.tracker=2"], 1, ["maskpro.tracker"]),
    "option without a label": (["--method", "wanda", "--set", "steps=3"], 1, ["LABEL.option=value"]),
    "option of another label": (["--method", "wanda", "--set", "wand.x=3"], 1, ["unknown label 'wand'", "'wanda'"]),
    "unknown preset": (["--method", "maskpro", "--set", "maskpro.preset=papr"], 1, ["unknown preset", "'paper'"]),
    "pattern 5:4": (["--method", "wanda", "--pattern", "5:4"], 1, ["5:4", "1 <= N < M", "2:4"]),
    "pattern 0:4": (["--method", "wanda", "--pattern", "0:4"], 1, ["0:4", "1 <= N < M"]),
    "pattern a:b": (["--method", "wanda", "--pattern", "a:b"], 1, ["'a:b'", "N:M", "2:4"]),
    "pattern twice": (["--method", "wanda", "--pattern", "2:4", "--pattern", "2:4"], 1, ["'2:4' is given twice"]),
    "unknown metric": (["--method", "wanda", "--metric", "pp:demo@64"], 1, ["unknown metric 'pp'", "'ppl'"]),
    "metric without a window": (["--method", "wanda", "--metric", "ppl:demo"], 1, ["ppl:<data set>@<window>"]),
    "unknown data set": (["--method", "wanda", "--metric", "ppl:demp@64"], 1, ["unknown data set 'demp'", "'demo'"]),
    "unknown calibration": (["--method", "wanda", "--calibration", "c5"], 1, ["unknown data set 'c5'", "'c4'"]),
    "no such text": (["--method", "wanda", "--calibration", "text:none.txt"], 1, ["none.txt does not exist"]),
    "unknown model": (["--method", "wanda", "--model", "dmo"], 1, ["unknown model 'dmo'", "'demo'"]),
    "no such folder": (["--method", "wanda", "--model", "./none"], 1, ["./none does not exist"]),
    "hub name without scheme": (["--method", "wanda", "--model", "org/name"], 1, ["hf:org/name"]),
    "unknown tiny model": (["--method", "wanda", "--model", "tiny:lama"], 1, ["lama", "llama"]),
    "unknown dtype": (["--method", "wanda", "--dtype", "float31"], 1, ["unknown dtype 'float31'", "'float32'"]),
    "unknown device": (["--method", "wanda", "--device", "cpux"], 1, ["unknown device 'cpux'", "'cpu'"]),
    "M does not divide the rows": (
        ["--method", "wanda", "--pattern", "2:5", *LITTLE],
        1,
        ["model.layers.0.self_attn.q_proj has 64 inputs, not a multiple of 5", "--skip 'q_proj'"],
    ),
    "skip matches nothing": (
        ["--method", "wanda", "--skip", "nolayer", *LITTLE],
        1,
        ["--skip 'nolayer' matches no", "q_proj"],
    ),
    "pattern-for matches nothing": (
        ["--method", "wanda", "--pattern-for", "no=4:8", *LITTLE],
        1,
        ["--pattern-for 'no'"],
    ),
    "layer pattern twice": (
        ["--method", "wanda", "--pattern-for", "mlp.*=4:8", "--pattern-for", "mlp.*=1:4"],
        1,
        ["'mlp.*' is given twice"],
    ),
    "pattern-for without a pattern": (["--method", "wanda", "--pattern-for", "mlp.*"], 1, ["N:M"]),
    "same label twice": (["--method", "wanda", "--method", "wanda"], 1, ["LABEL=NAME"]),
    "label dense": (["--method", "dense=wanda"], 1, ["'dense' is the reference row"]),
    "a learner as init": (["--method", "maskpro", "--set", "maskpro.init=maskpro"], 1, ["one-shot method"]),
    "no label as init": (
        ["--method", "maskpro", "--set", "maskpro.init=jugded", "--method", "judged=swaps-judged"],
        1,
        ["option maskpro.init", "label of another method in this command (judged)", "'jugded' is neither"],
    ),
    "a learner to be refined": (
        ["--method", "swaps", "--set", "swaps.init=maskpro"],
        1,
        ["swaps.init", "one-shot method"],
    ),
    "a refiner to be refined": (
        ["--method", "swaps", "--set", "swaps.init=swaps"],
        1,
        ["option swaps.init must name a scorer or a solver; 'swaps' is a refiner itself"],
    ),
    "nothing to be refined": (
        ["--method", "swaps", "--set", "swaps.init=wand"],
        1,
        ["option swaps.init must name a one-shot method", "'wand' is neither. Did you mean 'wanda'?"],
    ),
    "pattern beyond a method": (
        ["--method", "maskpro", "--pattern", "2:64"],
        1,
        ["maskpro cannot prune to 2:64", "32"],
    ),
    "window beyond the model": (["--method", "wanda", "--metric", "ppl:demo@1024"], 1, ["longer than the 512 tokens"]),
    "text too short for a window": (
        ["--method", "wanda", "--metric", "ppl:text:short.txt@64"],
        1,
        ["shorter than one window"],
    ),
    "too little calibration text": (
        ["--method", "wanda", "--windows", "99999", *LITTLE],
        1,
        ["99999 are needed", "--windows"],
    ),
    "missing configuration": (["--config", "none.toml"], 1, ["none.toml does not exist"]),
    "missing plugin file": (["--method", "wanda", "--plugin", "none.py"], 1, ["none.py does not exist"]),
    "no method": ([], 2, ["--method"]),
    "unknown flag": (["--metod", "wanda"], 2, ["No such option", "--method"]),
    "flag of the wrong type": (["--method", "wanda", "--windows", "x"], 2, ["--windows"]),
    "flag out of range": (["--method", "wanda", "--windows", "0"], 2, ["--windows"]),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_clear_line(nmbench, texts, tmp_path, name):
    """The error says what is wrong, where, and what was expected; no run directory is left behind."""
    flags, status, pieces = CASES[name]
    model = [] if "--model" in flags else MODEL
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "long.txt").write_bytes((texts / "cal.txt").read_bytes())
    result = nmbench("run", *model, *flags, "--out", "out")
    assert result.exit_code == status, result.output
    for piece in pieces:
        assert piece in result.stderr
    assert "Traceback" not in result.output
    assert len([line for line in result.stderr.splitlines() if line.startswith("Error: ")]) == 1
    assert status == 2 or len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def saved_model(folder, change=lambda model: None):
    """A tiny model as a transformers folder, after `change`."""
    from nmbench_plugins.tiny import TinyModel

    bundle = TinyModel().load("llama")
    with torch.no_grad():
        change(bundle.model)
    bundle.model.save_pretrained(folder)
    bundle.tokenizer.save_pretrained(folder)


def test_a_folder_without_weights(nmbench, tmp_path):
    """A transformers folder whose weights are missing says so."""
    saved_model(tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    result = nmbench("run", "--method", "wanda", "--model", "model")
    assert result.exit_code == 1
    assert "model folder model has no weights" in result.stderr


def test_a_folder_that_is_no_model(nmbench, tmp_path):
    """Any other folder is refused by what it lacks."""
    (tmp_path / "model").mkdir()
    result = nmbench("run", "--method", "wanda", "--model", "model")
    assert result.exit_code == 1
    assert "has no config.json" in result.stderr


def test_torn_weights(nmbench, tmp_path):
    """A truncated weights file gives one line, not a traceback."""
    saved_model(tmp_path / "model")
    content = (tmp_path / "model/model.safetensors").read_bytes()
    (tmp_path / "model/model.safetensors").write_bytes(content[: len(content) // 2])
    result = nmbench("run", "--method", "wanda", "--model", "model")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: cannot load model model: ")
    assert len(result.stderr.splitlines()) == 1


def test_a_folder_with_some_weights_missing(nmbench, tmp_path):
    """Weights that transformers would draw at random are named instead."""
    saved_model(tmp_path / "model")
    tensors = safetensors.torch.load_file(tmp_path / "model/model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    result = nmbench("run", "--method", "wanda", "--model", "model")
    assert result.exit_code == 1
    assert "has no weights for model.layers.1.mlp.up_proj.weight (1 missing)" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(nmbench, tmp_path, value):
    """NaN or Inf weights stop the run before anything is computed, and the layer is named."""

    def poison(model):
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value

    saved_model(tmp_path / "model", poison)
    result = nmbench("run", "--method", "wanda", "--model", "model", "--calibration", "demo", "--out", "out")
    assert result.exit_code == 1
    assert "model.layers.1.mlp.up_proj" in result.stderr
    assert "NaN or infinite" in result.stderr


def halve(model):
    for block in model.model.layers:
        block.mlp.up_proj.weight.view(-1, 4)[:, :2] = 0


def test_a_checkpoint_that_is_sparse_already(nmbench, small, tmp_path, records):
    """It is refused with what was found, unless the user says to go on; then the manifest tells."""
    saved_model(tmp_path / "model", halve)
    flags = [*small[: small.index("--set")], "--model", "model"]
    command = ["run", "--method", "magnitude", *flags, "--out", "out"]
    result = nmbench(*command)
    assert result.exit_code == 1
    assert (
        "2 of 14 layers of model are sparse already, first model.layers.0.mlp.up_proj with 50.0% zeros and strictly 2:4"
        in result.stderr.splitlines()[-1]
    )
    assert not (tmp_path / "out").exists()
    assert nmbench(*command, "--allow-sparse").exit_code == 0
    assert json.loads((tmp_path / "out/manifest.json").read_text())["model_provenance"]["already_sparse"]["layers"] == 2
    assert [row["status"] for row in records(tmp_path / "out")] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq, 4 bits"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
    ],
)
def test_a_quantised_checkpoint(nmbench, tmp_path, method, kind):
    """It is refused by the method that its configuration names, before any weight is read."""
    saved_model(tmp_path / "model")
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": method}))
    result = nmbench("run", "--method", "wanda", "--model", "model", "--calibration", "demo")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: model model is quantised ({kind}); prune the checkpoint that it was made")
    assert len(result.stderr.splitlines()) == 1


def test_a_model_without_prunable_layers(nmbench, tmp_path):
    """A transformer whose blocks hold no linear layer is refused with the reason."""
    source = tmp_path / "bare.py"
    source.write_text(
        "import nmbench, torch\n"
        "class Bare(nmbench.ModelSource):\n"
        "    def load(self, ref):\n"
        "        return nmbench.Bundle.of('bare', torch.nn.Embedding(8, 8), None)\n"
        "@nmbench.hookimpl\n"
        "def nmbench_register_models(register):\n"
        "    register('bare', Bare)\n"
    )
    result = nmbench("run", "--method", "wanda", "--model", "bare", "--plugin", source)
    assert result.exit_code == 1
    assert "no stack of decoder blocks with linear layers" in result.stderr


def test_a_hub_model_without_network(nmbench):
    """Offline, a hub name fails with one line that names the model."""
    result = nmbench("run", "--method", "wanda", "--model", "hf:nobody/nothing@main")
    assert result.exit_code == 1
    assert "hf:nobody/nothing@main" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_hub_data_set_without_network(nmbench):
    """Offline, a hub data set fails with one line that says how to use local text."""
    result = nmbench("run", "--method", "wanda", *MODEL, "--calibration", "c4")
    assert result.exit_code == 1
    assert "text:FILE" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_calibrating_on_the_test_text_is_refused(nmbench, texts):
    """Calibration and test text must not overlap."""
    same = f"text:{texts}/cal.txt"
    flags = ["--windows", "2", "--window-tokens", "64", "--pool-tokens", "128", "--selection-tokens", "64"]
    result = nmbench("run", "--method", "wanda", *MODEL, "--calibration", same, "--metric", f"ppl:{same}@64", *flags)
    assert result.exit_code == 1
    assert "calibrate on another text" in result.stderr


def test_the_directory_of_another_run_is_not_touched(nmbench, finished, small, tmp_path):
    """Another protocol in the same directory is refused with the difference, and every file stays as it was."""
    finished(*small)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    result = nmbench("run", *small, "--windows", "3")
    assert result.exit_code == 1
    assert "windows was 4, now 3" in result.stderr
    assert "--out" in result.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_other_options_under_a_label_are_refused(nmbench, finished, small):
    """A label means one set of options for the life of a run directory."""
    finished(*small)
    result = nmbench("run", *small, "--set", "maskpro.steps=7")
    assert result.exit_code == 1
    assert "label 'maskpro' was maskpro with steps=6" in result.stderr
    assert "--method maskpro2=maskpro" in result.stderr


def test_an_output_path_that_is_a_file(nmbench, small, tmp_path):
    """`--out` naming a file is refused, and the file keeps its content."""
    (tmp_path / "out").write_text("precious")
    result = nmbench("run", *small)
    assert result.exit_code in (1, 2)
    assert "Traceback" not in result.output
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize(
    "content", ["methods = 3", "unknwon = 1", "[methods.wanda\n", 'windows = "x"\n[methods.wanda]']
)
def test_a_broken_configuration(nmbench, tmp_path, content):
    """A configuration file that is no TOML or no run specification gives one line with its name."""
    (tmp_path / "run.toml").write_text(content)
    result = nmbench("run", "--config", "run.toml")
    assert result.exit_code in (1, 2)
    assert "Traceback" not in result.output
    assert result.stderr


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from nmbench.cli import main
main(sys.argv[2:])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on file sizes (POSIX)")
def test_a_disk_that_refuses(nmbench, python, small, records, tmp_path):
    """When a file cannot be written the run stops with one line; with room again the same command goes on."""
    failed = python.run("-c", LIMITED, "6000", "run", *small, "--method", "magnitude", "--quiet")
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert "cannot write" in failed.stderr
    before = records(tmp_path / "out") if (tmp_path / "out/records.jsonl").exists() else []
    result = nmbench("run", *small, "--method", "magnitude")
    assert result.exit_code == 0, result.output
    after = records(tmp_path / "out")
    assert after[: len(before)] == before
    assert [row["label"] for row in after if row["status"] == "ok"] == ["dense", "maskpro@init", "maskpro", "magnitude"]


def test_report_of_something_else(nmbench, tmp_path):
    """`nmbench report` on a folder that is no run directory says what it misses."""
    result = nmbench("report", tmp_path)
    assert result.exit_code == 1
    assert "records.jsonl" in result.stderr


def test_unknown_report_format(nmbench, finished, small):
    """An unknown report format names the nearest one."""
    finished(*small)
    result = nmbench("report", "out", "--format", "jsn")
    assert result.exit_code == 1
    assert "Did you mean 'json'?" in result.stderr


def test_a_broken_record_is_named_by_its_line(nmbench, finished, small, tmp_path):
    """A damaged line in the middle of records.jsonl is an error with its number, not a lost row."""
    finished(*small)
    path = tmp_path / "out/records.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{broken", *lines[1:]]) + "\n")
    result = nmbench("run", *small)
    assert result.exit_code == 1
    assert "line 2 is not a JSON object" in result.stderr
    assert json.loads(path.read_text().splitlines()[0])["label"] == "dense"


def test_seeds_that_no_generator_takes(nmbench):
    """A seed beyond 63 bits is refused in one line before anything is loaded; the largest one is taken."""
    from nmbench.spec import LARGEST_SEED, MethodSpec, RunSpec

    assert RunSpec((MethodSpec.parse("wanda"),), seeds=(LARGEST_SEED,)).seeds == (LARGEST_SEED,)
    for seed in (LARGEST_SEED + 1, 2**64, 10**30):
        result = nmbench("run", "--model", "tiny:llama", "--method", "wanda", "--seed", seed)
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: seeds must be") and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("report", "caf\udce9"),
        ("run", "--method", "wanda", "--out", "caf\udce9"),
        ("validate", "a", "--like", "\udcff"),
    ],
)
def test_names_that_are_not_text(nmbench, arguments):
    """An argument whose bytes are not UTF-8 is refused in one line by every command."""
    result = nmbench(*arguments)
    assert result.exit_code == 1
    assert "holds bytes that are not UTF-8" in result.stderr and len(result.stderr.splitlines()) == 1


FULL = """
import os, sys
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
from nmbench.cli import main
main()
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [["methods"], ["--help"]])
def test_output_that_cannot_be_written(python, arguments):
    """Output to a full disk is one line and exit status 1."""
    done = python.run("-c", FULL, *arguments)
    assert done.returncode == 1
    assert done.stderr == "Error: the output cannot be written: No space left on device.\n"


def test_code_in_a_model_folder_needs_a_word(nmbench, flags_of_code, tmp_path):
    """Code of a model and code in a pickle never run unasked; each is one line with its remedy."""
    import torch
    import transformers

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    config = transformers.LlamaConfig(vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    folder = tmp_path / "model"
    config.save_pretrained(folder)
    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
    result = nmbench(*flags_of_code)
    assert result.exit_code == 1 and "bring its weights as safetensors." in result.stderr.splitlines()[-1]
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    auto = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": auto}))
    result = nmbench(*flags_of_code)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].endswith("read the code, and allow it to run by --trust-remote-code.")
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def flags_of_code(texts):
    """A run of magnitude on the folder `model`."""
    text = ["--calibration", f"text:{texts}/cal.txt", "--metric", f"ppl:text:{texts}/test.txt@64"]
    return ["run", "--method", "magnitude", "--model", "model", *text, "--out", "out"]


def test_a_manifest_that_is_torn(nmbench, small, tmp_path):
    """A manifest that is no JSON is one line; a count that no machine holds is one too."""
    flags = [flag if flag != "maskpro" else "magnitude" for flag in small if "maskpro." not in flag and flag != "--set"]
    assert nmbench("run", *flags).exit_code == 0
    (tmp_path / "out/manifest.json").write_text("{")
    result = nmbench("run", *flags)
    assert result.exit_code == 1
    assert "manifest.json is not JSON" in result.stderr.splitlines()[-1]
    result = nmbench("run", *flags, "--windows", 10**30)
    assert result.exit_code == 1 and "windows must be at most" in result.stderr.splitlines()[-1]
