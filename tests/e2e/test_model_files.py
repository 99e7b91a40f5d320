"""Laws of model files: names that are not those of modules, GGUF, dtypes, other classes, no network."""

from __future__ import annotations

import json
import shutil
import socket

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from nmbench.artifacts.artifact import layer_name
from nmbench.pattern import Pattern

SMALL = {
    **{"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "head_dim": 16},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
EYES = {
    **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16},
    "patch_size": 8,
}
TWO_FOUR = Pattern(2, 4)


def byte_tokenizer():
    """A tokenizer of 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def saved(folder, model, dtype=torch.float32):
    """Save a model and the byte tokenizer to a folder."""
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def causal(config, **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**{**SMALL, **more}))


def llama(**more):
    return causal(transformers.LlamaConfig, **more)


def gemma_with_eyes():
    """Gemma 3 with a vision tower: files name its decoder `language_model.model`."""
    torch.manual_seed(0)
    config = transformers.Gemma3Config(text_config=SMALL, vision_config=EYES, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


def llava():
    """A model that `AutoModelForCausalLM` does not load, around a decoder that it does."""
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SMALL),
        vision_config=transformers.CLIPVisionConfig(**EYES, projection_dim=16),
    )
    return transformers.LlavaForConditionalGeneration(config)


def edited(path, change):
    """Change the content of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **change}), encoding="utf-8")


@pytest.fixture
def run(nmbench, texts):
    """Run a method on a model folder; returns click's result."""

    def go(model, *arguments, out="out", method=("--method", "magnitude")):
        scale = ["--windows", 2, "--window-tokens", 32, "--calibration", f"text:{texts}/cal.txt", "--quiet"]
        scale += ["--metric", f"ppl:text:{texts}/test.txt@32"]
        return nmbench("run", "--model", model, *method, *scale, "--out", out, *arguments)

    return go


def pruned_on_disk(source, target, inside):
    """Copy a folder, and make its decoder matrices 2:4 by magnitude, as others publish them: under their own names."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    for name, weight in tensors.items():
        if weight.dim() == 2 and inside in name:
            tensors[name] = torch.where(TWO_FOUR.top(weight.abs()), weight, 0.0)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


# Names


@pytest.mark.parametrize(
    ("make", "inside"),
    [
        (gemma_with_eyes, "language_model.model.layers."),
        (lambda: causal(transformers.ExaoneConfig), "transformer.h."),
        (llava, "language_model.model.layers."),
    ],
    ids=["gemma3", "exaone", "llava"],
)
def test_names_of_files_that_are_not_those_of_modules(run, nmbench, tmp_path, records, make, inside):
    """Such a model is exported under the names of its file, and its own 2:4 checkpoint is imported and strict."""
    saved(tmp_path / "dense", make())
    pruned_on_disk(tmp_path / "dense", tmp_path / "sparse", inside)
    published = ("--method", "magnitude", "--method", "there=import", "--set", "there.path=sparse")
    result = run("dense", method=published)
    assert result.exit_code == 0, result.output
    rows = {row["label"]: row for row in records(tmp_path / "out")}
    assert rows["there"]["proof"]["masks_digest"] == rows["magnitude"]["proof"]["masks_digest"]
    assert rows["there"]["notes"]["imported"]["kept_weights_unlike_dense"] == 0
    result = nmbench("export", "out", "magnitude", "--to", "exported")
    assert result.exit_code == 0, result.output
    dense, exported = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "exported"))
    assert set(dense) == set(exported)
    found = json.loads(nmbench("validate", "sparse", "--json").stdout)
    assert len(found["layers"]) == rows["magnitude"]["coverage"]["layers"]
    assert found["coverage"] == pytest.approx(rows["magnitude"]["coverage"]["share_of_decoder"])


def test_masks_under_the_names_of_files(run, tmp_path, records):
    """Masks without a configuration beside them, named as the tensors of the files are, are those of the layers."""
    saved(tmp_path / "dense", causal(transformers.ExaoneConfig))
    pruned_on_disk(tmp_path / "dense", tmp_path / "sparse", "transformer.h.")
    tensors = load_file(tmp_path / "sparse/model.safetensors")
    masks = {f"{layer_name(n)}.mask": w != 0 for n, w in tensors.items() if ".h." in n and w.dim() == 2}
    save_file(masks, tmp_path / "masks.safetensors")
    method = ("--method", "magnitude", "--method", "there=import", "--set", "there.path=masks.safetensors")
    result = run("dense", method=method)
    assert result.exit_code == 0, result.output
    rows = {row["label"]: row for row in records(tmp_path / "out")}
    assert rows["there"]["proof"]["masks_digest"] == rows["magnitude"]["proof"]["masks_digest"]


def test_experts_stored_one_by_one(run, tmp_path, records):
    """A 2:4 checkpoint with a matrix for every expert is imported into the model, which joins them in two tensors."""
    more = {"num_local_experts": 2, "num_experts_per_tok": 1}
    saved(tmp_path / "dense", causal(transformers.MixtralConfig, **more))
    assert any("experts.1.w2" in name for name in load_file(tmp_path / "dense/model.safetensors"))
    pruned_on_disk(tmp_path / "dense", tmp_path / "sparse", "layers.")
    result = run("dense", method=("--method", "magnitude", "--method", "there=import", "--set", "there.path=sparse"))
    assert result.exit_code == 0, result.output
    rows = {row["label"]: row for row in records(tmp_path / "out")}
    assert rows["there"]["proof"]["masks_digest"] == rows["magnitude"]["proof"]["masks_digest"]
    assert rows["there"]["notes"]["imported"]["kept_weights_unlike_dense"] == 0


# Dtypes


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_an_export_has_the_dtype_of_its_checkpoint(run, nmbench, tmp_path, dtype):
    """A checkpoint of 16 bits, pruned in float32 on a CPU, is exported in its own dtype; `--dtype` asks for another."""
    saved(tmp_path / "model", llama(), dtype)
    assert run("model").exit_code == 0
    for flags, expected in (([], dtype), (["--dtype", "float32"], torch.float32)):
        shutil.rmtree(tmp_path / "exported", ignore_errors=True)
        result = nmbench("export", "out", "magnitude", "--to", "exported", *flags)
        assert result.exit_code == 0, result.output
        assert {t.dtype for t in load_file(tmp_path / "exported/model.safetensors").values()} == {expected}
        assert json.loads((tmp_path / "exported/config.json").read_text())["dtype"] == str(expected)[6:]
        assert "rounded" not in (tmp_path / "exported/README.md").read_text(encoding="utf-8")
    result = nmbench("export", "out", "magnitude", "--to", "other", "--dtype", "float8")
    assert result.exit_code == 1 and "unknown dtype 'float8'" in result.stderr


def test_rounding_is_said(run, nmbench, tmp_path):
    """Weights that the dtype of an export rounds are counted; a weight too large for the dtype is refused."""
    model = llama()
    model.model.embed_tokens.weight.data[7, 0] = 1e5  # of a token that no text holds
    saved(tmp_path / "model", model)
    assert run("model").exit_code == 0
    result = nmbench("export", "out", "magnitude", "--to", "half", "--dtype", "float16")
    assert result.exit_code == 1
    assert "model.embed_tokens.weight holds weights too large for float16; export with --dtype float32" in result.stderr
    result = nmbench("export", "out", "magnitude", "--to", "brief", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "weights were rounded to bfloat16; they were measured as float32." in result.stderr
    assert "were rounded to bfloat16" in (tmp_path / "brief/README.md").read_text(encoding="utf-8")


def test_tensors_without_dimensions(run, nmbench, tmp_path):
    """A parameter of no dimensions is no obstacle, from the run to the export."""
    model = llama()
    saved(tmp_path / "model", model)
    code = (
        "import torch, transformers\n"
        "class Scaled(transformers.LlamaForCausalLM):\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        self.scale = torch.nn.Parameter(torch.tensor(1.0))\n"
        "        self.register_buffer('count', torch.tensor(3))\n"
    )
    (tmp_path / "model/modeling_scaled.py").write_text(code)
    edited(tmp_path / "model/config.json", {"auto_map": {"AutoModelForCausalLM": "modeling_scaled.Scaled"}})
    tensors = load_file(tmp_path / "model/model.safetensors")
    more = {"scale": torch.tensor(2.0), "count": torch.tensor(4)}
    save_file({**tensors, **more}, tmp_path / "model/model.safetensors", {"format": "pt"})
    assert run("model", "--trust-remote-code").exit_code == 0
    result = nmbench("export", "out", "magnitude", "--to", "exported")
    assert result.exit_code == 0, result.output
    assert load_file(tmp_path / "exported/model.safetensors")["scale"].item() == 2.0
    assert nmbench("validate", "exported").exit_code == 0


# GGUF

LLAMA_IN_GGUF = {  # module -> the part of a GGUF name
    **{"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"},
    **{"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"},
    **{"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(parameter):
    """The GGUF name of a parameter of Llama."""
    module = parameter.removesuffix(".weight")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.weight"
    _, _, block, rest = module.split(".", 3)
    return f"blk.{block}.{LLAMA_IN_GGUF[rest]}.weight"


def interleaved(weight, heads):
    """Rows of a rotary projection in the order of GGUF: the halves of each head alternate."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write_gguf(path, model):
    """Write a Llama model as a GGUF file in float32, with a tokenizer of bytes and one merge."""
    gguf = pytest.importorskip("gguf")
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "\u0120t"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(symbols)
    writer.add_token_types([1] * len(symbols))
    writer.add_token_merges(["\u0120 t"])
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        count = heads.get(name.split(".")[-2])
        writer.add_tensor(gguf_name(name), (interleaved(weight, count) if count else weight).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_row_of_a_gguf_file_is_exported(run, nmbench, tmp_path, records):
    """A row of a GGUF file is exported as plain weights: those of the model that the file was made from."""
    model = llama(vocab_size=257)
    write_gguf(tmp_path / "m.gguf", model)
    result = run("gguf:m.gguf")
    assert result.exit_code == 0, result.output
    result = nmbench("export", "out", "magnitude", "--to", "exported")
    assert result.exit_code == 0, result.output
    assert "quantization_config" not in json.loads((tmp_path / "exported/config.json").read_text())
    exported = load_file(tmp_path / "exported/model.safetensors")
    for name, weight in model.state_dict().items():
        kept = TWO_FOUR.top(weight.abs()) if "proj" in name else torch.ones_like(weight, dtype=torch.bool)
        assert torch.equal(exported[name], torch.where(kept, weight, 0.0))


# Classes


def test_models_that_are_not_causal_are_refused_by_the_name_of_their_class(run, tmp_path):
    """An encoder-decoder is refused, its class named."""
    config = transformers.T5Config(vocab_size=256, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    config.architectures = ["T5ForConditionalGeneration"]
    saved(tmp_path / "model", transformers.T5ForConditionalGeneration(config))
    result = run("model")
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert "is no causal language model: it is made by T5ForConditionalGeneration" in last


def test_a_local_model_asks_nobody(run, tmp_path, monkeypatch):
    """A model in a folder is run without one request, also where requests are not forbidden."""
    from huggingface_hub import constants

    def refused(*arguments, **options):
        asked.append(arguments)
        raise OSError("no network in this test")

    asked = []
    saved(tmp_path / "model", llama())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    assert run("model").exit_code == 0
    assert not asked and constants.HF_HUB_OFFLINE is False
