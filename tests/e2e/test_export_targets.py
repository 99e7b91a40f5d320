"""Exports for engines: packed folders compute what plain ones do; what an engine cannot run is refused."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nmbench.runtime import load_packed
from nmbench.runtime.packed import packed_layers

TOKENS = torch.arange(40)[None]


@pytest.fixture
def run(finished, texts):
    """Prune a tiny model into `out`; the same run is done once for all tests."""

    def go(model, *arguments):
        lengths = ["--windows", "4", "--window-tokens", "64", "--pool-tokens", "2048", "--selection-tokens", "1024"]
        data = ["--calibration", f"text:{texts}/cal.txt", "--metric", f"ppl:text:{texts}/test.txt@64", "--quiet"]
        return finished("--model", model, "--method", "magnitude", *data, *lengths, "--out", "out", *arguments)

    return go


def exported(nmbench, *arguments):
    result = nmbench("export", "out", "magnitude", *arguments)
    assert result.exit_code == 0, result.output
    return result


FRESH = """
import sys, torch, safetensors.torch
from nmbench.runtime import load_packed
model = load_packed(sys.argv[1])
with torch.no_grad():
    safetensors.torch.save_file({"logits": model(torch.arange(40)[None]).logits}, sys.argv[2])
"""


@pytest.mark.parametrize(
    ("model", "pattern", "dtype"),
    [
        ("tiny:llama", "2:4", "bfloat16"),
        ("tiny:gpt2", "2:4x2", "float32"),
        pytest.param("tiny:gemma2", "6:8", "float32", marks=pytest.mark.slow),
        pytest.param("tiny:opt", "4:6", "float16", marks=pytest.mark.slow),
        ("tiny:phi3", "8:16", "bfloat16"),
        pytest.param("demo", "1:4", "float32", marks=pytest.mark.slow),
    ],
)
def test_a_packed_folder_has_the_logits_of_the_plain_one(run, nmbench, python, tmp_path, model, pattern, dtype):
    """In a fresh process a packed folder gives the logits of the plain export bit for bit, and it is strict."""
    if pattern == "4:6":
        run(
            model,
            "--pattern",
            pattern,
            "--dtype",
            dtype,
            "--pattern-for",
            "q_proj=2:4",
            "--pattern-for",
            "k_proj=2:4",
            "--pattern-for",
            "v_proj=2:4",
            "--pattern-for",
            "out_proj=2:4",
            "--pattern-for",
            "fc1=2:4",
        )
    else:
        run(model, "--pattern", pattern, "--dtype", dtype)
    exported(nmbench, "--to", "plain")
    said = exported(nmbench, "--to", "packed", "--for", "packed").stdout
    assert f"STRICT {pattern}" in said or "STRICT 2:4" in said
    done = python.run("-c", FRESH, "packed", "logits.safetensors", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    logits = safetensors.torch.load_file(tmp_path / "logits.safetensors")["logits"]
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    with torch.no_grad():
        assert torch.equal(logits, dense(TOKENS).logits)
    packed = load_packed(tmp_path / "packed")
    assert packed_layers(packed).keys() == {n.removesuffix(".weight") for n in masks_in(tmp_path / "packed")}
    held = sum(layer.packed.bytes for layer in packed_layers(packed).values())
    assert f"packed layers: {held} bytes" in said
    assert packed.generate(TOKENS, max_new_tokens=3, min_new_tokens=3).tolist() == (
        dense.generate(TOKENS, max_new_tokens=3, min_new_tokens=3).tolist()
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "packed")("words")["input_ids"]
    found = json.loads(nmbench("validate", "packed", "--json", "--checksums").stdout)
    plain = json.loads(nmbench("validate", "plain", "--json").stdout)
    assert found["strict"] and found["basis"] == plain["basis"] and found["coverage"] == plain["coverage"]
    assert [layer["groups"] for layer in found["layers"]] == [layer["groups"] for layer in plain["layers"]]
    assert found["changed_files"] == []


def masks_in(folder):
    with safetensors.safe_open(folder / "nmbench/masks.safetensors", framework="pt") as file:
        return list(file.keys())


def test_a_packed_folder_is_no_dense_model(run, nmbench, tmp_path):
    """transformers does not take a packed folder for a model without weights, and a plain folder is not packed."""
    run("tiny:llama")
    exported(nmbench, "--to", "packed", "--for", "packed")
    exported(nmbench, "--to", "plain")
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    from nmbench.errors import NMBenchError

    with pytest.raises(NMBenchError, match="holds no packed model"):
        load_packed(tmp_path / "plain")


def test_a_damaged_packed_folder_is_not_judged(run, nmbench, tmp_path):
    """A packed folder with a file of another shape, a missing file, or no layers is refused with one line."""
    from nmbench.errors import NMBenchError

    run("tiny:llama")
    exported(nmbench, "--to", "packed", "--for", "packed")
    path = tmp_path / "packed/packed-00001.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = "model.layers.0.mlp.up_proj"
    broken = {**tensors, f"{name}.codes": tensors[f"{name}.codes"][:, :-1].contiguous()}
    safetensors.torch.save_file(broken, path, {"format": "pt"})
    result = nmbench("validate", "packed")
    assert result.exit_code == 3 and f"is damaged: {name}.codes is U8 (96, 7), expected (96, 8)." in result.stderr
    with pytest.raises(NMBenchError, match=r"does not fit its config\.json"):
        load_packed(tmp_path / "packed")
    codes = tensors[f"{name}.codes"].clone()
    codes[3, 0] = 0  # both indices of a group are 0
    safetensors.torch.save_file({**tensors, f"{name}.codes": codes}, path, {"format": "pt"})
    result = nmbench("validate", "packed")
    assert result.exit_code == 1 and "first: row 3, columns 0..3 keep 1 instead of 2" in result.stdout
    del tensors["model.norm.weight"]
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    with pytest.raises(NMBenchError, match=r"model\.norm\.weight is missing"):
        load_packed(tmp_path / "packed")
    path.unlink()
    assert nmbench("validate", "packed").exit_code == 3


def test_the_folder_for_old_vllm(run, nmbench, tmp_path):
    """It has the configuration that vLLM 0.18 reads, which ignores dense layers; `validate` flags the configuration."""
    run("tiny:llama", "--dtype", "bfloat16", "--skip", "down_proj")
    result = exported(nmbench, "--to", "vllm", "--for", "vllm-0.18")
    assert "WARNING --for vllm-0.18 is for vLLM 0.18 and older" in result.stderr and "not run by us" in result.stderr
    config = json.loads((tmp_path / "vllm/config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"], config["config_groups"]) == ("compressed-tensors", "dense", {})
    sparsity = config["sparsity_config"]
    ignored = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"]
    assert sparsity == {"format": "dense", "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": ignored}
    found = nmbench("validate", "vllm")
    assert found.exit_code == 0 and "STRICT 2:4" in found.stdout
    assert "WARNING config.json has quantization_config.sparsity_config: vLLM 0.19 and newer refuse" in found.stdout
    assert len(json.loads(nmbench("validate", "vllm", "--json").stdout)["flags"]) == 1
    exported(nmbench, "--to", "plain")
    assert json.loads(nmbench("validate", "plain", "--json").stdout)["flags"] == []


def test_compressed_tensors_reads_the_configuration(run, nmbench, tmp_path):
    """The public code of compressed-tensors parses the configuration for vLLM 0.18 as dense storage of 2:4."""
    readers = pytest.importorskip("compressed_tensors.config", reason="compressed-tensors is not installed")
    run("tiny:llama", "--dtype", "bfloat16", "--skip", "down_proj")
    exported(nmbench, "--to", "vllm", "--for", "vllm-0.18")
    sparsity = json.loads((tmp_path / "vllm/config.json").read_text())["quantization_config"]["sparsity_config"]
    read = readers.SparsityCompressionConfig.load_from_registry(sparsity["format"], **sparsity)
    assert (read.format, read.sparsity_structure, read.targets) == ("dense", "2:4", ["Linear"])


@pytest.mark.parametrize(
    ("model", "flags", "engine", "message"),
    [
        (
            "tiny:llama",
            ("--pattern", "4:8"),
            "vllm-0.18",
            "multiplies 2:4 alone, and model.layers.0.",
        ),
        ("tiny:llama", (), "vllm-0.18", "multiplies 16-bit weights, not float32; add --dtype bfloat16"),
        ("tiny:llama", ("--dtype", "bfloat16", "--skip", "k_proj"), "vllm-0.18", "k_proj is dense beside"),
        ("tiny:gpt2", ("--dtype", "bfloat16"), "vllm-0.18", "is stored [in, out]"),
        ("tiny:mixtral", (), "packed", "is one of several experts in one parameter; export --for plain"),
        ("tiny:llama", ("--pattern", "1:4"), "slidesparse", "slides 2:4, 4:6, 6:8, 8:10, and"),
        ("tiny:llama", ("--pattern-for", "q_proj=6:8"), "slidesparse", "one --L, and"),
        ("tiny:llama", (), "torchao", "torchao 0.18 has no file format for its 2:4 weights"),
        ("tiny:llama", (), "vlm", "unknown target 'vlm'."),
    ],
)
def test_what_an_engine_cannot_run_is_refused(run, nmbench, tmp_path, model, flags, engine, message):
    """One line names the layer, the engine's limit and the remedy; no folder is left."""
    run(model, *flags)
    before = sorted(tmp_path.iterdir())
    result = nmbench("export", "out", "magnitude", "--to", "new", "--for", engine)
    assert result.exit_code == 1 and message in result.stderr, result.stderr
    assert "\n" not in result.stderr.strip()
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("pattern", ["2:4", "6:8"])
def test_the_folder_for_slidesparse_is_plain(run, nmbench, tmp_path, pattern):
    """The folder of a pattern that SlideSparse converts is a plain one, its card names the tool, and it is strict."""
    run("tiny:llama", "--pattern", pattern)
    result = exported(nmbench, "--to", "slide", "--for", "slidesparse")
    assert "INT8 or FP8 (not run by us" in result.stderr
    assert "--Z 2 --L M" in (tmp_path / "slide/README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "slide")(TOKENS).logits.isfinite().all()
    assert "SlideSparse" in nmbench("validate", "slide").stdout


@pytest.mark.parametrize("engine", ["plain", "packed"])
def test_exact_fills_short_groups(nmbench, texts, tmp_path, monkeypatch, engine):
    """Kept zeros become tiny in a plain folder and stay stored zeros in a packed one; the effect is said."""
    from nmbench_plugins.tiny import TinyModel

    usual = TinyModel.load

    def with_zeros(source, ref):
        bundle = usual(source, ref)
        bundle.layers["model.layers.0.mlp.up_proj"].read()[:5, :4] = 0.0
        return bundle

    monkeypatch.setattr(TinyModel, "load", with_zeros)
    flags = ["--model", "tiny:llama", "--method", "magnitude", "--out", "zeros", "--quiet"]
    lengths = ["--windows", "4", "--window-tokens", "64", "--pool-tokens", "2048", "--selection-tokens", "1024"]
    data = ["--calibration", f"text:{texts}/cal.txt", "--metric", f"ppl:text:{texts}/test.txt@64"]
    result = nmbench("run", *flags, *lengths, *data)
    assert result.exit_code == 0, result.output
    for name, more in (("short", ()), ("full", ("--exact",))):
        result = nmbench("export", "zeros", "magnitude", "--to", name, "--for", engine, *more)
        assert result.exit_code == 0, result.output
    short = json.loads(nmbench("validate", "short", "--json").stdout)
    full = json.loads(nmbench("validate", "full", "--json").stdout)
    assert (short["exactly"], short["groups_with_fewer"]) == (False, 5) and short["strict"] and full["strict"]
    assert "at most N non-zeros: 5 groups have fewer than N" in nmbench("validate", "short").stdout
    if engine == "packed":
        assert "10 kept weights are zero; the packed form stores them" in result.stdout
        return
    assert "10 kept zeros were set to 1.2e-38" in result.stdout
    assert "10 kept zeros were set to 1.2e-38" in (tmp_path / "full/README.md").read_text()
    assert (full["exactly"], full["groups_with_fewer"]) == (True, 0)
    first, second = (safetensors.torch.load_file(tmp_path / f"{n}/model.safetensors") for n in ("short", "full"))
    differ = {name: int((first[name] != second[name]).sum()) for name in first}
    assert {name: count for name, count in differ.items() if count} == {"model.layers.0.mlp.up_proj.weight": 10}
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(tmp_path / n)(TOKENS).logits for n in ("short", "full")]
    assert torch.equal(*logits)


def test_packed_bytes_are_printed_beside_dense_ones(run, nmbench):
    """Rows of 64 in 16 bits at 2:4 take 9/16 of the bytes of dense ones."""
    run("tiny:llama", "--dtype", "bfloat16")
    said = exported(nmbench, "--to", "packed", "--for", "packed").stdout
    assert "56.2% of" in said


def test_a_packed_folder_is_read_like_any_other(run, nmbench):
    """`diff` finds the masks of the row in its packed folder, and `validate` names what runs the pattern."""
    run("tiny:llama", "--pattern", "6:8")
    exported(nmbench, "--to", "packed", "--for", "packed")
    shares = json.loads(nmbench("diff", "out:magnitude", "packed", "--json").stdout)["total"]["shares"]
    assert set(shares.values()) == {1.0}
    found = json.loads(nmbench("validate", "packed", "--json").stdout)
    assert found["hardware"] == {
        "6:8": [
            "NVIDIA sparse tensor cores through SlideSparse (INT8, FP8)",
            "nmbench's packed form (NVIDIA GPU, decoding; memory everywhere)",
        ]
    }
