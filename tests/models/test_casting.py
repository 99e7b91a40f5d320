"""Casting a loaded model gives the dtypes, and the bits, of loading it in that dtype."""

from typing import ClassVar

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from nmbench.models.bit_equality import same_bits
from nmbench.models.bundle import Bundle
from nmbench.models.casting import cast_parameters

SIZES = {
    **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


class Careful(transformers.LlamaForCausalLM):
    """A model whose output norm is kept in float32 by name, and whose gain is made in float32."""

    _keep_in_fp32_modules_strict: ClassVar[set[str]] = {"model.norm"}
    _keep_in_fp32_modules: ClassVar[set[str]] = {"input_layernorm"}

    def __init__(self, config):
        super().__init__(config)
        self.gain = torch.nn.Parameter(torch.ones(3, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("careful", [True, False])
def test_casting_is_loading(tmp_path, dtype, careful):
    """A model that is cast has every parameter of the model that is loaded in that dtype, bit for bit."""
    torch.manual_seed(0)
    cls = Careful if careful else AutoModelForCausalLM
    config = transformers.LlamaConfig(**SIZES)
    (cls(config) if careful else cls.from_config(config)).save_pretrained(tmp_path)
    cast = cast_parameters(cls.from_pretrained(tmp_path, dtype=torch.float32), dtype)
    loaded = cls.from_pretrained(tmp_path, dtype=dtype)
    for name, parameter in loaded.named_parameters():
        assert same_bits(cast.get_parameter(name), parameter), name
    kept = {name for name, parameter in loaded.named_parameters() if parameter.dtype != dtype}
    assert ("model.norm.weight" in kept) == (careful and dtype != torch.float64)
    assert ("model.layers.0.input_layernorm.weight" in kept) == (careful and dtype == torch.float16)


def test_a_bundle_in_another_dtype_keeps_them_too():
    """`Bundle.in_dtype` leaves parameters in float32 that loading in the dtype would leave so."""
    torch.manual_seed(0)
    bundle = Bundle.of("careful", Careful(transformers.LlamaConfig(**SIZES)), None).in_dtype(torch.bfloat16)
    assert bundle.dtype == torch.bfloat16
    assert bundle.model.model.norm.weight.dtype == bundle.model.gain.dtype == torch.float32


def test_modules_of_other_libraries_are_cast_whole():
    """A model that is not transformers' has no parameters to keep."""
    assert cast_parameters(torch.nn.Linear(2, 2), torch.bfloat16).weight.dtype == torch.bfloat16
