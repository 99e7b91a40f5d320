"""Laws of the context of a model: its limit is found under every name, and no limit is invented."""

import pytest
import torch
import transformers
from torch import nn

from nmbench.models.context import context_tokens, sliding_window, trained_tokens
from nmbench_plugins.tiny import FAMILIES, TinyModel

TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


class Holder(nn.Module):
    """A module with a configuration, and a table of positions of `rows` if given."""

    def __init__(self, config, rows=None):
        super().__init__()
        self.config = config
        if rows:
            self.pos_emb = nn.Embedding(rows, 4)


class Other:
    """A configuration of another kind than those of transformers."""

    def __init__(self, **entries):
        self.__dict__.update(entries)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.LlamaConfig(max_position_embeddings=64), 64),
        (transformers.GPT2Config(n_positions=48), 48),
        (transformers.MptConfig(max_seq_len=40), 40),  # ALiBi, and yet a table of that many rows
        (transformers.Gemma3Config(text_config={**TEXT, "max_position_embeddings": 72}), 72),
        (Other(llm_config={"max_position_embeddings": 24}, max_position_embeddings=99), 24),
        (Other(thinker_config=Other(text_config=Other(max_sequence_length=20))), 20),
        (Other(seq_length=56), 56),
        (Other(block_size=32, text_config="a path"), 32),
        (Other(max_position_embeddings=-1), None),
        (Other(max_position_embeddings=None), None),
        (transformers.BloomConfig(seq_length=32), None),
        (transformers.FalconConfig(alibi=True, max_position_embeddings=32), None),
        (transformers.RwkvConfig(context_length=32), None),
        (transformers.MambaConfig(), None),
    ],
)
def test_context(config, expected):
    """The limit of the text decoder counts, under whichever name; ALiBi and recurrence have none."""
    assert context_tokens(Holder(config)) == expected


def test_the_table_of_positions_is_a_limit():
    """Where no configuration tells, the rows of the learnt positions do; a model without either is unlimited."""
    assert context_tokens(Holder(Other(), rows=12)) == 12
    assert context_tokens(Holder(None)) is None


def test_context_of_training():
    """The model that reads more than it was trained with says how much that was."""
    assert trained_tokens(Holder(transformers.FalconConfig(alibi=True, max_position_embeddings=32))) == 32
    assert trained_tokens(Holder(transformers.LlamaConfig(max_position_embeddings=32))) is None


def test_the_longest_window_really_runs():
    """A window of the limit is read, and one beyond it is what the limit protects from, in a table of positions."""
    model = TinyModel().load("gpt2").model
    limit = context_tokens(model)
    assert limit == 512
    model(input_ids=torch.zeros(1, limit, dtype=torch.int64))
    with pytest.raises(IndexError):
        model(input_ids=torch.zeros(1, limit + 1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        *((FAMILIES[name], 16) for name in ("mistral", "gemma2", "gemma3")),
        *((FAMILIES[name], None) for name in ("llama", "qwen3", "gpt2")),
        (("Gemma3Config", {"text_config": {**TEXT, "sliding_window": 8}}), 8),
        (("Gemma3TextConfig", {**TEXT, "sliding_window": 8, "layer_types": ["full_attention"] * 2}), None),
        (("Qwen2Config", {"sliding_window": 8, "use_sliding_window": False}), None),
        (("GPTNeoConfig", {"window_size": 12}), 12),
    ],
    ids=str,
)
def test_sliding_window(config, expected):
    """The window of attention is found where a block uses it, and nowhere else."""
    name, settings = config
    assert sliding_window(Holder(getattr(transformers, name)(**settings))) == expected
