"""The prunable weights of many architectures, discovered by nmbench on small random models.

Prints a table, architecture x (layers found, pruned strictly 2:4 by Wanda on a few random windows, share of the
decoder, weights that stay dense and the reason), and writes results/architectures.json. The first models are those of
`tiny:`; nmbench was not prepared for the other architectures.

    python benchmarks/architectures.py
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from nmbench.errors import NMBenchError
from nmbench.models.applying import apply
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.pattern import Pattern
from nmbench.pruning.one_shot import prune_one_shot
from nmbench.verification.strict import check_strict
from nmbench_plugins.tiny import COMMON, FAMILIES, LLAMA
from nmbench_plugins.wanda import Wanda

PATTERN = Pattern(2, 4)
RESULTS = Path(__file__).parent / "results" / "architectures.json"
MOE = {**LLAMA, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
OLD = {"n_embd": 64, "n_layer": 2, "n_head": 4}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2": ("Qwen2Config", LLAMA),
    "OLMo 2": ("Olmo2Config", LLAMA),
    "SmolLM3": ("SmolLM3Config", LLAMA),
    "Cohere": ("CohereConfig", LLAMA),
    "Gemma 4": ("Gemma4TextConfig", LLAMA),
    "StarCoder2": ("Starcoder2Config", LLAMA),
    "BLOOM": ("BloomConfig", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "GPT-J": ("GPTJConfig", {**OLD, "rotary_dim": 8}),
    "GPT-OSS": ("GptOssConfig", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "OLMoE": ("OlmoeConfig", {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2-MoE": ("Qwen2MoeConfig", {**MOE, "shared_expert_intermediate_size": 32, "num_experts": 4}),
    "Qwen3-Next": ("Qwen3NextConfig", {**MOE, **DELTA, "shared_expert_intermediate_size": 32, "num_experts": 4}),
    "DeepSeek-V3": (
        "DeepseekV3Config",
        {
            **{k: v for k, v in MOE.items() if k not in ("head_dim", "num_key_value_heads")},
            **LATENT,
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "Llama 4": ("Llama4TextConfig", {**LLAMA, "intermediate_size_mlp": 96, "num_local_experts": 4}),
    "JetMoE": ("JetMoeConfig", {**LLAMA, "num_local_experts": 4, "kv_channels": 16}),
    "Mamba": ("MambaConfig", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
    "Gemma 3n": (
        "Gemma3nTextConfig",
        {**LLAMA, "vocab_size_per_layer_input": 257, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0},
    ),
}


def main() -> None:
    transformers.logging.set_verbosity_error()
    rows = [row(*item) for item in models()]
    print("| architecture | found | pruned | share of the decoder | left dense, and why |")
    print("|---|---|---|---|---|")
    for r in rows:
        share = "-" if r["share_of_decoder"] is None else f"{r['share_of_decoder']:.1%}"
        print(f"| {r['architecture']} | {r['found']} | {r['pruned']} | {share} | {r['why']} |")
    content = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "pattern": str(PATTERN),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def models() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, configuration class and settings of every model of the table."""
    for family, (config, settings) in FAMILIES.items():
        yield f"tiny:{family}", config, settings
    for name, (config, settings) in OTHERS.items():
        yield name, config, settings


def row(name: str, config: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The line of one architecture in the table."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**{**COMMON, **settings}))
    bundle = Bundle.of(name, model, None)
    windows = torch.randint(256, (8, 64), generator=torch.Generator().manual_seed(0))
    patterns = dict.fromkeys(bundle.layers, PATTERN)
    fused = sum(layer.fused for layer in bundle.layers.values())
    found = f"{len(bundle.layers)}" + (f", {fused} of experts" if fused else "")
    try:
        pruned = prune_one_shot(bundle, DenseWeights(bundle), Wanda(), patterns, windows, name).pruned
        apply(bundle, pruned)
        check_strict({n: layer.read() for n, layer in bundle.layers.items()}, pruned.masks, patterns, name)
    except NMBenchError as error:
        return {"architecture": name, "found": found, "pruned": 0, "share_of_decoder": None, "why": f"refused: {error}"}
    share = bundle.coverage()["share_of_decoder"]
    return {
        "architecture": name,
        "found": found,
        "pruned": len(pruned.masks),
        "share_of_decoder": share,
        "why": "; ".join(f"{count} {reason}" for reason, count in reasons(bundle).items()),
    }


def reasons(bundle: Bundle) -> Counter[str]:
    """The number of matrices that stay dense, by reason, without their shapes."""
    return Counter(reason.rpartition(" (")[0] for reason in bundle.skipped.values())


if __name__ == "__main__":
    main()
