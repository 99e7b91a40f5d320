"""`tiny:FAMILY`: small random models of real architectures, for tests. Their perplexity is meaningless."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import nmbench

BOS = 256  # the 256 byte values, then one special token
COMMON = {
    "vocab_size": 257,
    "max_position_embeddings": 512,
    "bos_token_id": BOS,
    "eos_token_id": BOS,
    "pad_token_id": BOS,
}
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", LLAMA),
    "mistral": ("MistralConfig", {**LLAMA, "sliding_window": 16}),
    "qwen3": ("Qwen3Config", LLAMA),
    "gemma2": ("Gemma2Config", {**LLAMA, "sliding_window": 16, "query_pre_attn_scalar": 16}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **LLAMA,
            "sliding_window": 16,
            "query_pre_attn_scalar": 16,
            "layer_types": [
                "sliding_attention",
                "full_attention",
            ],  # blocks with other masks and rotary tables
        },
    ),
    "phi3": ("Phi3Config", {k: v for k, v in LLAMA.items() if k != "head_dim"}),
    "gptneox": (
        "GPTNeoXConfig",
        {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_inner": 96, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "mixtral": ("MixtralConfig", {**LLAMA, "num_local_experts": 4}),
    "qwen3moe": ("Qwen3MoeConfig", {**LLAMA, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
    ),
}


@dataclass(frozen=True)
class TinyModel(nmbench.ModelSource):
    """A random model of one family with two blocks of width 64, always the same weights, and a byte tokenizer."""

    def load(self, ref: str) -> nmbench.Bundle:
        import torch

        if ref not in FAMILIES:
            raise nmbench.NMBenchError(f"tiny model {ref!r} is not known; there are {', '.join(sorted(FAMILIES))}.")
        model = copy.deepcopy(random_model(ref))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, self.dtype or "float32"))
        return nmbench.Bundle.of(f"tiny:{ref}", model, byte_tokenizer(), DEFAULTS)


@functools.cache
def random_model(ref: str) -> Any:
    """Return the model of a family, in host memory; a copy of it takes half the time of a new one."""
    import torch
    import transformers

    name, settings = FAMILIES[ref]
    config = getattr(transformers, name)(**{**COMMON, **settings})
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(0)  # that of the CPU alone: torch.manual_seed takes longer than the model
        return transformers.AutoModelForCausalLM.from_config(config)


DEFAULTS = nmbench.Defaults(
    calibration="demo",
    windows=8,
    window_tokens=64,
    pool_tokens=32 * 64,
    selection_tokens=8 * 64,
    metrics=("ppl:demo@512",),
)


def byte_tokenizer() -> Any:
    """Return a tokenizer with one token per byte of UTF-8 and a beginning-of-sequence token in front."""
    import tokenizers
    import transformers
    from tokenizers import decoders, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)} | {"<bos>": BOS}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<bos>")


@nmbench.hookimpl
def nmbench_register_models(register: nmbench.Register) -> None:
    register("tiny", TinyModel)
