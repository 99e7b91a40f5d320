"""Laws of quantised checkpoints: said what was found, refused, or dequantised where the user says so."""

import json

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from nmbench_plugins.tiny import TinyModel

BLOCK = 32  # rows and columns that share a scale
FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
SMALL = ["--windows", 2, "--window-tokens", 32, "--pool-tokens", 2048, "--selection-tokens", 1024]


def saved(folder, change=lambda tensors: tensors, quantisation=None):
    """A tiny model as a transformers folder, its tensors after `change`; returns those before."""
    bundle = TinyModel().load("llama")
    bundle.model.save_pretrained(folder)
    bundle.tokenizer.save_pretrained(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(change(dict(tensors)), folder / "model.safetensors", {"format": "pt"})
    if quantisation:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
    return tensors


def in_fp8(tensors):
    """Every projection in 8 bits, with a scale for every block beside it."""
    for name in [name for name in tensors if "proj" in name]:
        blocks = tensors[name].unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [rows, BLOCK, columns, BLOCK]
        scale = blocks.abs().amax((1, 3), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        tensors[name] = (blocks / scale).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
    return tensors


def as_numbers(tensors):
    """The numbers that the weights of `in_fp8` represent."""
    small = in_fp8(dict(tensors))
    for name in [name for name in tensors if "proj" in name]:
        scale = small[f"{name}_scale_inv"].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        tensors[name] = small[name].float() * scale
    return tensors


@pytest.fixture
def run(nmbench, texts):
    """Prune a model by magnitude; returns click's result."""
    flags = ["--calibration", f"text:{texts}/cal.txt", "--metric", f"ppl:text:{texts}/test.txt@64", *SMALL]
    return lambda *others, out="out": nmbench("run", "--method", "magnitude", *flags, "--out", out, *others)


def test_dequantised_on_request(run, tmp_path, records):
    """With the flag a checkpoint in 8 bits is the model that its numbers stand for, and the manifest tells."""
    pytest.importorskip("accelerate")
    saved(tmp_path / "small", in_fp8, FP8)
    saved(tmp_path / "plain", as_numbers)
    refused = run("--model", "small")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("Error: model small is quantised (fp8); prune the checkpoint that it was made")
    assert refused.stderr.endswith("or go on with --dequantise.\n")
    assert not (tmp_path / "out").exists()
    assert run("--model", "small", "--dequantise").exit_code == 0
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["model_provenance"]["dequantised_from"] == "fp8"
    assert manifest["environment"]["dtype"] == "float32"
    assert run("--model", "plain", out="other").exit_code == 0
    small, plain = ([row["metrics"] for row in records(tmp_path / name)] for name in ("out", "other"))
    assert small == plain


def test_a_dequantised_row_is_exported(run, nmbench, tmp_path):
    """The export holds plain numbers, and its configuration speaks of no quantisation."""
    pytest.importorskip("accelerate")
    saved(tmp_path / "small", in_fp8, FP8)
    assert run("--model", "small", "--dequantise").exit_code == 0
    result = nmbench("export", "out", "magnitude", "--to", "export")
    assert result.exit_code == 0, result.stderr
    assert "quantization_config" not in json.loads((tmp_path / "export/config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert nmbench("validate", "export").exit_code == 0


@pytest.mark.parametrize("flag", [[], ["--dequantise"]], ids=["no flag", "flag"])
def test_a_configuration_that_is_silent(run, tmp_path, flag):
    """8-bit weights that the configuration says nothing of would be cast to wrong numbers: refused, with a name."""
    saved(tmp_path / "model", in_fp8)
    result = run("--model", "model", *flag)
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: model model holds 14 quantised weights, first model.layers.0.")
    assert "(F8_E4M3), and its configuration does not name the quantisation; prune the checkpoint" in last


def test_integer_weights(run, tmp_path):
    """Integers are no weights, with or without a scale beside them."""
    name = "model.layers.1.mlp.up_proj.weight"
    saved(tmp_path / "model", lambda tensors: {**tensors, name: (tensors[name] * 100).to(torch.int8)})
    result = run("--model", "model")
    assert result.exit_code == 1
    assert f"holds 1 quantised weights, first {name} (I8)" in result.stderr.splitlines()[-1]


def stored_as(folder, form):
    """Store the weights of a folder in another form that transformers reads."""
    whole = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(whole)
    whole.unlink()
    if form == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    names = sorted(tensors)
    files = {f"part-{i}.{form.partition('-')[0]}": names[i::2] for i in range(2)}
    for file, held in files.items():
        part = {name: tensors[name] for name in held}
        if form == "bin-shards":
            torch.save(part, folder / file)
        else:
            safetensors.torch.save_file(part, folder / file, {"format": "pt"})
    index = "pytorch_model.bin.index.json" if form == "bin-shards" else "model.safetensors.index.json"
    where = {name: file for file, held in files.items() for name in held}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize("form", ["bin", "bin-shards", "safetensors"])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_small_weights_in_files_of_any_name(run, tmp_path, form, kind):
    """8-bit weights are found in pickled files and in shards, whatever the names of the files."""

    def small(tensors):
        for name in [name for name in tensors if "proj" in name]:
            weight = tensors[name]
            tensors[name] = (weight * 100).to(torch.int8) if kind == "int8" else weight.to(torch.float8_e4m3fn)
        return tensors

    saved(tmp_path / "model", small)
    stored_as(tmp_path / "model", form)
    result = run("--model", "model")
    assert result.exit_code == 1
    assert "holds 14 quantised weights, first model.layers.0." in result.stderr.splitlines()[-1]


def test_plain_weights_in_files_of_any_name(run, tmp_path, records):
    """A checkpoint of plain numbers gives the same rows from files of every form."""
    saved(tmp_path / "model")
    assert run("--model", "model").exit_code == 0
    before = [row["metrics"] for row in records(tmp_path / "out")]
    for form in ("bin", "bin-shards", "safetensors"):
        saved(tmp_path / form)
        stored_as(tmp_path / form, form)
        assert run("--model", form, out=f"of-{form}").exit_code == 0
        assert [row["metrics"] for row in records(tmp_path / f"of-{form}")] == before, form


SPARSE_ONLY = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}}


@pytest.mark.parametrize("groups", [{}, None], ids=["no groups", "none"])
def test_a_configuration_that_only_says_sparse(run, nmbench, tmp_path, groups):
    """Weights in plain numbers whose configuration names zeros and no quantisation are pruned like others."""
    about = {
        **SPARSE_ONLY,
        "config_groups": groups,
        "sparsity_config": {"format": "dense", "sparsity_structure": "2:4"},
    }
    saved(tmp_path / "model", quantisation=about)
    assert run("--model", "model").exit_code == 0
    assert nmbench("export", "out", "magnitude", "--to", "export").exit_code == 0
    assert "quantization_config" not in json.loads((tmp_path / "export/config.json").read_text())
    assert nmbench("validate", "export").exit_code == 0


def test_zeros_that_are_not_stored(run, tmp_path):
    """A format of compressed-tensors that leaves zeros out is refused by its name, with what to do."""
    about = {**SPARSE_ONLY, "sparsity_config": {"format": "sparse-24-bitmask"}}
    saved(tmp_path / "model", quantisation=about)
    result = run("--model", "model", "--dequantise")
    assert result.exit_code == 1
    assert "compressed format 'sparse-24-bitmask' of compressed-tensors" in result.stderr.splitlines()[-1]


def test_compressed_tensors_with_small_weights(run, tmp_path):
    """A configuration of compressed-tensors that names a group of small weights is one of a quantisation."""
    about = {**SPARSE_ONLY, "format": "int-quantized", "config_groups": {"a": {"weights": {"num_bits": 8}}}}
    saved(tmp_path / "model", quantisation=about)
    result = run("--model", "model")
    assert result.exit_code == 1
    assert "model model is quantised (compressed-tensors)" in result.stderr.splitlines()[-1]


def test_a_scale_that_nobody_reads(run, tmp_path):
    """A number beside a weight that transformers does not know says how to read the weight."""
    name = "model.layers.1.mlp.up_proj.weight_scale"
    saved(tmp_path / "model", lambda tensors: {**tensors, name: torch.ones(1)})
    result = run("--model", "model")
    assert result.exit_code == 1
    assert f"has {name} (1 of this kind) beside a weight" in result.stderr.splitlines()[-1]


def test_what_cannot_be_dequantised(run, tmp_path):
    """A quantisation that transformers cannot undo is refused in one line, with and without the flag."""
    saved(tmp_path / "model", quantisation={"quant_method": "gptq", "bits": 4, "group_size": 128})
    result = run("--model", "model", "--dequantise")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: cannot load model model: ")
    assert not (tmp_path / "out").exists()


def test_the_flag_changes_nothing_else(run, tmp_path, records):
    """A checkpoint of plain numbers is the same with and without the flag."""
    saved(tmp_path / "model")
    assert run("--model", "model").exit_code == 0
    before = records(tmp_path / "out")
    assert run("--model", "model", "--dequantise").exit_code == 0
    assert records(tmp_path / "out") == before
