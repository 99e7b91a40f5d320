"""Random models with the shapes of known ones, for scripts that measure time and memory and ignore the output.

transformers is imported when a model is made: a script that chooses a shape may have yet to choose its GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import transformers

    from nmbench.models.bundle import Bundle


@dataclass(frozen=True)
class Shape:
    """A Llama: width, inputs of the down projection, blocks, heads, heads of keys and values, vocabulary."""

    width: int
    inner: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int

    def config(self, blocks: int | None = None, vocabulary: int | None = None) -> transformers.LlamaConfig:
        import transformers

        return transformers.LlamaConfig(
            vocab_size=vocabulary or self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=blocks or self.blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=8192,
        )


SHAPES = {
    "tiny": Shape(64, 192, 2, 4, 2, 256),
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 49152),
    "llama-3.1-8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "llama-3.1-70b": Shape(8192, 28672, 80, 64, 8, 128256),
}


def without_weights(name: str) -> Bundle:
    """A bundle of `shape` in bfloat16 on the meta device, whose tensors hold no numbers."""
    import transformers

    from nmbench.models.bundle import Bundle

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(SHAPES[name].config()).to(torch.bfloat16)
    return Bundle.of(name, model, None)


def random_model(
    name: str, blocks: int | None, dtype: torch.dtype, device: torch.device, vocabulary: int | None = None
) -> Bundle:
    """A bundle with random weights on a device, the same numbers every time; with fewer `blocks`, or a smaller
    `vocabulary`, than the shape has.

    Weights are drawn on the device, in the dtype: on a host alone, billions of them would take minutes.
    """
    import transformers

    from nmbench.models.bundle import Bundle

    config = SHAPES[name].config(blocks, vocabulary)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1)  # norms
        else:
            parameter.data.normal_(0, config.initializer_range, generator=generator)
    rotary = type(model.model.rotary_emb)(config=config)  # buffers are computed, not drawn
    model.model.rotary_emb = rotary.to(device)
    return Bundle.of(name, model, None)
