"""The context of a model: the tokens that it can read at once, and the reach of its attention.

Configurations name the limit in many ways, and those of models with several modalities nest the text decoder's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

LIMITS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "max_sequence_len",
    "max_seqlen",
    "sequence_length",
    "max_target_positions",
    "seq_length",
    "seq_len",
    "context_length",
    "max_context_length",
    "model_max_length",
    "block_size",
)
NESTED = ("text_config", "llm_config", "language_config", "decoder", "thinker_config")
WITHOUT_POSITIONS = ("bloom", "rwkv")  # model types whose limit is that of training: ALiBi, recurrence
SLIDING = ("sliding_window", "attention_window_size", "attention_chunk_size")
LOCAL = ("sliding_attention", "chunked_attention", "local")  # entries of lists of layer types
POSITIONS = ("wpe", "embed_positions", "position_embeddings", "position_embedding", "pos_emb", "pos_embed")


def context_tokens(model: nn.Module) -> int | None:
    """Return the most tokens that `model` can read at once; None if nothing limits it.

    The limit of the text decoder comes first. Without a limit in the configuration, the rows of a table of learnt
    positions are the limit.
    """
    for config in configs_of(model):
        if unlimited(config):
            return None
        if found := first_number(config, LIMITS):
            return found
    return position_rows(model)


def trained_tokens(model: nn.Module) -> int | None:
    """Return the context of training of a model that can read more than that; None for any other model."""
    config = next(filter(unlimited, configs_of(model)), None)
    return first_number(config, LIMITS)


def sliding_window(model: nn.Module) -> int | None:
    """Return the number of tokens that the attention of some or all blocks is limited to; None: all tokens."""
    for config in configs_of(model):
        kinds = {kind for name in ("layer_types", "attention_layers") for kind in value(config, name) or ()}
        if kinds.isdisjoint(LOCAL) and kinds:
            return None
        if found := first_number(config, (*SLIDING, *(["window_size"] if kinds else []))):  # GPT-Neo's
            return found
    return None


def configs_of(model: nn.Module) -> Iterator[Any]:
    """Yield the configurations inside that of `model`, innermost text decoder first, then its own."""
    yield from nested(getattr(model, "config", None))


def nested(config: Any, depth: int = 4) -> Iterator[Any]:
    """Yield the configurations of text decoders inside `config`, then `config`."""
    for name in NESTED if depth else ():
        inner = getattr(config, name, None)
        if inner is not None and not isinstance(inner, (str, int, float, list, tuple)):
            yield from nested(inner, depth - 1)
    if config is not None:
        yield config


def unlimited(config: Any) -> bool:
    """Return True for positions that no table holds and that nothing cuts off: ALiBi, and recurrent models."""
    return bool(value(config, "alibi")) or value(config, "model_type") in WITHOUT_POSITIONS


def first_number(config: Any, names: Iterable[str]) -> int | None:
    """Return the first positive whole number among the entries `names`."""
    found = (value(config, name) for name in names)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)


def value(config: Any, name: str) -> Any:
    """Return an entry of a configuration, which may be a mapping; None if it has none."""
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def position_rows(model: nn.Module) -> int | None:
    """Return the rows of the smallest table of learnt positions; None without a table."""
    tables = (
        module.num_embeddings
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITIONS
    )
    return min(tables, default=None)
