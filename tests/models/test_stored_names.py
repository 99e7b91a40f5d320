"""Stored names lead to the parameters that transformers reads them into."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nmbench.models.bit_equality import same_bits
from nmbench.models.stored_names import StoredNames

SIZES = {
    **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
CONFIGS = (
    transformers.LlamaConfig(**SIZES),
    transformers.ExaoneConfig(**SIZES),
    transformers.MixtralConfig(**SIZES, num_local_experts=3),
    transformers.Lfm2Config(**SIZES),
)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
@pytest.mark.parametrize("original", [True, False], ids=["names of files", "names of modules"])
def test_parameters_are_read_as_transformers_reads_them(tmp_path, config, original):
    """The parts of a checkpoint, read by the mapping, are all parameters of the loaded model, bit for bit."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path, save_original_format=original)
    stored = load_file(tmp_path / "model.safetensors")
    with torch.device("meta"):
        names = StoredNames.of(AutoModelForCausalLM.from_config(config))
    live = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    read = dict(value for parts in names.parts(stored) for value in names.read(parts, stored.__getitem__))
    assert all(same_bits(read[name], live[name]) for name in read)
    tied = {live[name].data_ptr() for name in read}
    assert all(live[name].data_ptr() in tied for name in live)


def test_a_name_of_no_parameter_stays():
    """A name that no parameter is stored under is returned as is; so is every name of a model of another library."""
    with torch.device("meta"):
        names = StoredNames.of(AutoModelForCausalLM.from_config(CONFIGS[1]))
    assert names.parameter("transformer.h.0.attn.attention.q_proj.weight") == "model.layers.0.self_attn.q_proj.weight"
    assert names.parameter("model.layers.0.self_attn.q_proj.weight") == "model.layers.0.self_attn.q_proj.weight"
    assert names.parameter("visual.blocks.0.weight") == "visual.blocks.0.weight"
    assert StoredNames.of(torch.nn.Linear(2, 2)).parameter("transformer.h.0.x") == "transformer.h.0.x"
