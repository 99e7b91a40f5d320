"""How much device memory one-shot pruning of large models is estimated to need; no weight is made.

Prints a table, shape x method x (whole model on the device, blocks streamed from the host), in GiB, bfloat16, with 128
windows of 2048 tokens, and writes results/memory.json. These are estimates: `nmbench run` records what was measured, as
`peak_bytes`, in every row.

    python benchmarks/memory.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

from nmbench.calibrate import BATCH_TOKENS
from nmbench.memory import GIBIBYTE, estimate
from nmbench.models import Bundle
from nmbench_plugins.sparsegpt import SparseGPT
from nmbench_plugins.swaps import Swaps
from nmbench_plugins.wanda import Wanda

RESULTS = Path(__file__).parent / "results" / "memory.json"
WINDOWS, WINDOW_TOKENS = 128, 2048
SHAPES = {  # width, inputs of the down projection, blocks, heads, vocabulary
    "Llama 3.1 8B": (4096, 14336, 32, 32, 128256),
    "Llama 3.1 70B": (8192, 28672, 80, 64, 128256),
}
METHODS = {"wanda": Wanda(), "sparsegpt": SparseGPT(), "swaps": Swaps()}


def main() -> None:
    rows = []
    print("| model | method | whole model, GiB | streamed, GiB |\n|---|---|---|---|")
    for shape in SHAPES:
        bundle = without_weights(shape)
        for name, method in METHODS.items():
            whole, streamed = (
                estimate(bundle, method.needs, WINDOWS, WINDOW_TOKENS, "cuda", stream, BATCH_TOKENS).peak / GIBIBYTE
                for stream in (False, True)
            )
            print(f"| {shape} | {name} | {whole:.1f} | {streamed:.1f} |")
            rows.append({"model": shape, "method": name, "whole_gib": whole, "streamed_gib": streamed})
    content = {"windows": WINDOWS, "window_tokens": WINDOW_TOKENS, "dtype": "bfloat16", "rows": rows}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def without_weights(shape: str) -> Bundle:
    """A bundle of the shape whose tensors hold no numbers."""
    width, inner, blocks, heads, vocabulary = SHAPES[shape]
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    return Bundle.of(shape, model, None)


if __name__ == "__main__":
    main()
