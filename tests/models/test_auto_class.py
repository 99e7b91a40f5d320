"""Configurations lead to the class that loads the model whole; others are refused by the name of their class."""

import pytest
import transformers

from nmbench.errors import NMBenchError
from nmbench.models.auto_class import auto_class

TEXT = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.LlamaConfig(**TEXT), "AutoModelForCausalLM"),
        (transformers.LlavaConfig(), "AutoModelForImageTextToText"),
        (transformers.Qwen2VLConfig(), "AutoModelForImageTextToText"),
        (transformers.PreTrainedConfig(auto_map={"AutoModelForCausalLM": "mine.Model"}), "AutoModelForCausalLM"),
    ],
    ids=["llama", "llava", "qwen2vl", "own code"],
)
def test_the_class_that_loads_a_model(config, expected):
    """Causal models, models of the user's own code, and models that also read images have a class."""
    assert auto_class(config, "m").__name__ == expected


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (transformers.T5Config(architectures=["T5Model"]), "m is no causal language model: it is made by T5Model"),
        (transformers.CLIPVisionConfig(), "it is made by CLIPVision, which none of AutoModelForCausalLM"),
        (transformers.BlipConfig(architectures=["Odd"]), "it is made by Odd"),
    ],
    ids=["encoder-decoder", "vision", "captions"],
)
def test_models_that_are_no_causal_language_models(config, text):
    """The error names the class that the model was made by."""
    if isinstance(config, transformers.BlipConfig):
        config.is_encoder_decoder = True
    with pytest.raises(NMBenchError, match=text):
        auto_class(config, "m")
