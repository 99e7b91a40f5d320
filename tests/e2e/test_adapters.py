"""Laws of adapters: merged on request, with the logits that peft gives; else refused with the remedy."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from e2e.test_model_files import byte_tokenizer, edited, llama, saved

NAMES = [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.q_proj", "mlp.down_proj")]


def write_adapter(folder, base, model, rank=4, **more):
    """Write a LoRA adapter of random matrices for some layers of `model`."""
    torch.manual_seed(1)
    tensors = {}
    for name in NAMES:
        rows, columns = model.get_submodule(name).weight.shape
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, columns) / 4
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, rank) / 4
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)}
    about |= {"r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "down_proj"], **more}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(about))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merged_by_hand(model, adapter):
    """The weights of `model` with W + 2 B A in place of every adapted W."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for name in NAMES:
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        weights[f"{name}.weight"] += 2 * b @ a
    return weights


@pytest.fixture
def run(nmbench, texts):
    text = (
        "--calibration",
        f"text:{texts}/cal.txt",
        "--metric",
        f"ppl:text:{texts}/test.txt@64",
        "--window-tokens",
        "64",
    )
    return lambda *args: nmbench("run", "--method", "magnitude", "--windows", "4", *text, "--quiet", *args)


def one_line(result, *words):
    """A run that failed with one line, without a traceback."""
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ") and all(word in last for word in words), last


@pytest.mark.filterwarnings("ignore")  # of peft
@pytest.mark.parametrize("place", ["beside", "by path", "alone", "alone, base relative to it"])
def test_a_merged_model_is_the_one_that_peft_makes(run, tmp_path, records, place):
    """Wherever the adapter lies, rows are those of the saved model that peft merges, and the origin is recorded."""
    peft = pytest.importorskip("peft")
    base = saved(tmp_path / "base", llama())
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    named = "../base" if "relative" in place else base
    adapter = write_adapter(base if place == "beside" else tmp_path / "adapter", named, model)
    expected = merged_by_hand(model, adapter)
    whole = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    tokens = torch.arange(32)[None]
    logits = whole(tokens).logits
    whole.save_pretrained(tmp_path / "merged")
    byte_tokenizer().save_pretrained(tmp_path / "merged")
    flags = {"beside": ("base", "--merge-adapter"), "by path": ("base", "--merge-adapter", "adapter")}
    for name, given in (("mine", flags.get(place, ("adapter", "--merge-adapter"))), ("theirs", ("merged",))):
        result = run("--model", *given, "--out", name)
        assert result.exit_code == 0, result.output
    mine, theirs = (records(tmp_path / name) for name in ("mine", "theirs"))
    assert [row["metrics"] for row in mine] == [row["metrics"] for row in theirs]
    manifest, other = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("mine", "theirs"))
    assert manifest["model_provenance"]["merged_adapter"]["kind"] == "LORA"
    assert manifest["protocol_digest"] != other["protocol_digest"]
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base" if place != "beside" else tmp_path / "merged"
    )
    plain.load_state_dict(expected)
    assert torch.allclose(plain(tokens).logits, logits, atol=1e-4)


def test_a_merged_row_is_exported(run, nmbench, tmp_path):
    """An export holds the merged weights and no adapter."""
    pytest.importorskip("peft")
    model = llama()
    write_adapter(saved(tmp_path / "model", model), tmp_path / "model", model)
    expected = merged_by_hand(model, tmp_path / "model")
    assert run("--model", "model", "--merge-adapter", "--out", "out").exit_code == 0
    result = nmbench("export", "out", "magnitude", "--to", "exported")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "exported/adapter_config.json").exists()
    found = load_file(tmp_path / "exported/model.safetensors")
    for name in NAMES:
        kept = found[f"{name}.weight"] != 0
        assert torch.allclose(found[f"{name}.weight"], expected[f"{name}.weight"] * kept, atol=1e-6)
        assert int(kept.sum()) * 2 == kept.numel()


def test_what_cannot_be_merged(run, tmp_path):
    """Other names, other shapes, learnt prompts, a base that is not here: one line each, and nothing is pruned."""
    pytest.importorskip("peft")
    model = llama()
    base = saved(tmp_path / "base", model)
    odd = write_adapter(tmp_path / "odd", base, model)
    tensors = load_file(odd / "adapter_model.safetensors")
    save_file({n.replace("layers.1", "layers.7"): t for n, t in tensors.items()}, odd / "adapter_model.safetensors")
    one_line(run("--model", "base", "--merge-adapter", "odd"), "adapter odd cannot be merged into base", "layers.1")
    write_adapter(tmp_path / "wide", base, llama(hidden_size=64))
    one_line(run("--model", "base", "--merge-adapter", "wide"), "adapter wide cannot be merged", "size mismatch")
    shutil.copytree(odd, tmp_path / "far")
    edited(tmp_path / "far/adapter_config.json", {"base_model_name_or_path": "some/base"})
    one_line(run("--model", "far", "--merge-adapter"), "was made for some/base", "--merge-adapter far")
    one_line(run("--model", "base", "--merge-adapter", "base"), "base is no folder of an adapter")
    one_line(run("--model", "base", "--merge-adapter"), "base is no folder of an adapter")
    one_line(run("--model", "tiny:llama", "--merge-adapter", "wide"), "cannot be merged into model tiny:llama")
    one_line(run("--model", "hf:some/base", "--merge-adapter"), "give its folder")


def test_tied_weights_are_not_merged_wrongly(run, tmp_path):
    """An adapter of one of two layers that share a weight would change both: refused."""
    pytest.importorskip("peft")
    base = saved(tmp_path / "base", llama(tie_word_embeddings=True))
    folder = tmp_path / "head"
    folder.mkdir()
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": 2}
    (folder / "adapter_config.json").write_text(json.dumps({**about, "lora_alpha": 4, "target_modules": ["lm_head"]}))
    parts = {"A": torch.randn(2, 32), "B": torch.randn(256, 2)}
    save_file(
        {f"base_model.model.lm_head.lora_{p}.weight": t for p, t in parts.items()}, folder / "adapter_model.safetensors"
    )
    one_line(run("--model", "base", "--merge-adapter", "head"), "share", "without tied weights")


def test_without_peft(run, tmp_path, monkeypatch):
    """Without peft, one line says what to install."""
    from nmbench_plugins.huggingface import adapters

    model = llama()
    write_adapter(saved(tmp_path / "model", model), tmp_path / "model", model)
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    one_line(run("--model", "model", "--merge-adapter"), "needs the package peft: pip install 'nmbench[peft]'.")


@pytest.mark.parametrize("beside", [True, False], ids=["beside a model", "alone"])
def test_adapters_are_refused(run, tmp_path, beside):
    """A folder with an adapter is refused with what to do, whether the whole model lies beside it or not."""
    model = llama()
    folder = saved(tmp_path / "model", model) if beside else tmp_path / "model"
    write_adapter(folder, "some/base", model)
    result = run("--model", "model")
    one_line(result, "model model holds an adapter (adapter_config.json: LORA of some/base)", "--merge-adapter")
