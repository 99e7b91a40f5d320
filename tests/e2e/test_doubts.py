"""Doubts through the command line: said when they arise, kept in manifest and records, printed with every report."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nmbench.pattern import Pattern
from nmbench_plugins.demo import DemoModel
from nmbench_plugins.tiny import TinyModel


@pytest.fixture
def flags(texts):
    """A run of Wanda of a second or two on one small text."""
    sizes = ["--windows", 2, "--window-tokens", 32, "--calibration", f"text:{texts}/cal.txt", "--quiet"]
    return ["run", "--method", "wanda", "--metric", f"ppl:text:{texts}/test.txt@64", *sizes, "--out", "out"]


def save(bundle, folder):
    bundle.model.save_pretrained(folder)
    bundle.tokenizer.save_pretrained(folder)


def test_a_doubt_goes_everywhere(nmbench, flags, records, tmp_path):
    """Odd special tokens and a random model: on standard error with --quiet too, and in all that is written."""
    bundle = TinyModel().load("mistral")
    bundle.model.config.eos_token_id = bundle.model.generation_config.eos_token_id = 7
    save(bundle, tmp_path / "model")
    result = nmbench(*flags, "--model", "model")
    assert result.exit_code == 0, result.output
    *inputs, dense_doubt = [line.removeprefix("DOUBT ") for line in result.stderr.splitlines()]
    assert inputs[0].startswith("tokenizer: eos_token_id is 256 in the tokenizer and 7 in the configuration of model")
    assert dense_doubt.startswith("dense model: it does not predict text:")
    assert result.stdout.count("DOUBT tokenizer") == result.stdout.count("DOUBT dense model") == 1
    assert "no ranking, because the dense model does not predict this text" in result.stdout
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["doubts"] == inputs
    dense, wanda = records(tmp_path / "out")
    assert dense["doubts"] == [*inputs, dense_doubt]
    assert wanda["doubts"][: len(inputs)] == inputs
    assert dense["unranked"] == [f"{flags[4].removeprefix('ppl:')}"]
    assert dense["sliding_window"] == wanda["sliding_window"] == manifest["sliding_window"] == 16
    assert nmbench("report", "out", "--format", "html", "--format", "latex").stdout.count("DOUBT tokenizer") == 1
    for name in ("report.md", "report.html", "report.tex"):
        text = (tmp_path / "out" / name).read_text()
        assert text.count("DOUBT tokenizer") == 1
        assert "sliding window 16 tokens" in text


def test_a_row_better_than_dense(nmbench, flags, records, tmp_path):
    """A model that is worse dense than pruned is found: the row is named, with likely reasons."""
    bundle = DemoModel().load("")
    generator = torch.Generator().manual_seed(0)
    for layer in bundle.layers.values():  # noise where magnitude drops weights, a little smaller than those it keeps
        weight = layer.read()
        mask = Pattern(2, 4).top(weight.abs())
        least = torch.where(mask, weight.abs(), torch.inf).unflatten(1, (-1, 4)).amin(-1, keepdim=True)
        noise = 0.99 * least.expand(-1, -1, 4).flatten(1) * torch.randn(weight.shape, generator=generator).sign()
        layer.write(torch.where(mask, weight, noise))
    save(bundle, tmp_path / "model")
    result = nmbench(*[{"wanda": "magnitude"}.get(flag, flag) for flag in flags], "--model", "model")
    assert result.exit_code == 0, result.output
    row = records(tmp_path / "out")[1]
    (difference,) = row["against_dense"].values()
    assert difference["high"] < 0
    assert row["doubts"][-1].startswith("better than dense: distrust: text:")
    assert "DOUBT magnitude 2:4 seed 0: better than dense: distrust: text:" in result.stdout


def test_a_token_beyond_the_embedding(nmbench, flags, tmp_path):
    """A tokenizer with a token more than the model has rows, and a text with that token: one line, nothing measured."""
    bundle = TinyModel().load("llama")
    bundle.tokenizer.add_tokens(["the"])
    save(bundle, tmp_path / "model")
    result = nmbench(*flags, "--model", "model")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "has token 257, and the embeddings of model have 257 rows" in line
    assert not (tmp_path / "out").exists()


def test_rounded_weights_are_said(nmbench, flags, tmp_path):
    """A model with the scattered zeros of 4 bits is pruned, and the manifest and the terminal say what was seen."""
    bundle = TinyModel().load("llama")
    for layer in bundle.layers.values():
        step = layer.read().abs().amax(dim=1, keepdim=True) / 7
        layer.write((layer.read() / step).round() * step)
    save(bundle, tmp_path / "model")
    result = nmbench(*flags, "--model", "model")
    assert result.exit_code == 0, result.output
    assert "DOUBT model: 14 of 14 layers hold scattered zeros" in result.stderr
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["model_provenance"]["rounded_zeros"]["layers"] == 14


def test_a_nested_context(nmbench, flags, tmp_path):
    """A window beyond the context is refused where the limit has another name."""
    import transformers

    config = transformers.MptConfig(vocab_size=257, d_model=64, n_heads=4, n_layers=2, max_seq_len=48)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    TinyModel().load("llama").tokenizer.save_pretrained(tmp_path / "model")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == 257
    result = nmbench(*flags, "--model", "model")
    assert result.exit_code == 1
    assert "@64 is longer than the 48 tokens that model can read; choose less." in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("fault", ["fewer layers", "no biases", "scales of another name"])
def test_tensors_that_nobody_reads(nmbench, flags, tmp_path, fault):
    """Tensors of decoder blocks that the loaded model has no place for are a doubt."""
    bundle = TinyModel().load("llama")
    save(bundle, tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    first = next(name for name in tensors if name.endswith("layers.1.self_attn.q_proj.weight"))
    more = {
        "fewer layers": {
            n.replace("layers.1.", "layers.2."): t.clone() for n, t in tensors.items() if "layers.1." in n
        },
        "no biases": {first.replace("weight", "bias"): torch.ones(8)},
        "scales of another name": {f"scale_of.{first}": torch.ones(1)},
    }[fault]
    save_file({**tensors, **more}, path, {"format": "pt"})
    result = nmbench(*flags, "--model", "model")
    assert result.exit_code == 0, result.output
    assert f"DOUBT model: {len(more)} tensors of its decoder blocks are in its files" in result.stderr
    assert f"first {min(more)}" in result.stderr


def test_tensors_beside_the_decoder(nmbench, flags, tmp_path):
    """Tensors that the loaded model has no place for are no doubt if they are of no decoder block, or computed."""
    save(TinyModel().load("llama"), tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    more = {"vision.patch": torch.ones(2), "rotary.inv_freq": torch.ones(2)}
    save_file({**load_file(path), **more}, path, {"format": "pt"})
    result = nmbench(*flags, "--model", "model")
    assert result.exit_code == 0 and "in its files and not in the model" not in result.stderr, result.output


def test_code_that_did_not_run(nmbench, flags, tmp_path):
    """A folder with code of its own, for a type that transformers knows, runs no code unasked, and says so."""
    save(TinyModel().load("llama"), tmp_path / "model")
    (tmp_path / "model/modeling_own.py").write_text("open('ran', 'w').close()\nclass Own: pass\n")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    result = nmbench(*flags, "--model", "model")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "ran").exists()
    assert "brings code of its own, modeling_own.Own, which did not run: figures are those of LlamaFor" in result.stderr
