"""The class of transformers that loads a model by its configuration, whole, with its language-model head."""

from __future__ import annotations

from typing import Any

import transformers

from nmbench.errors import NMBenchError

WITH_TEXT = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
)  # in order of preference


def auto_class(config: Any, ref: str) -> Any:
    """Return the auto class for a configuration: that of causal models, else one of models that also read other inputs.

    The decoder of text inside such a model is pruned; its other towers stay dense. Raises `NMBenchError` for an
    encoder-decoder, and for a configuration that none of the classes loads, naming the class that would.
    """
    own = getattr(config, "auto_map", None) or {}
    known = [getattr(transformers, name) for name in WITH_TEXT if hasattr(transformers, name)]
    found = next((cls for cls in known if cls.__name__ in own or type(config) in cls._model_mapping), None)
    if found is None or getattr(config, "is_encoder_decoder", False):
        raise NMBenchError(f"model {ref} is no causal language model: {remedy(config)}")
    return found


def remedy(config: Any) -> str:
    """Return what the model is, and the model inside it that could be pruned, if transformers knows one."""
    made = ", ".join(getattr(config, "architectures", None) or ()) or type(config).__name__.removesuffix("Config")
    text = config.get_text_config(decoder=True)
    mapping = transformers.AutoModelForCausalLM._model_mapping
    if text is not config and type(text) in mapping:
        cls = mapping[type(text)]
        name = (cls[0] if isinstance(cls, tuple) else cls).__name__
        return f"it is made by {made}, whose decoder of text is a {name}; save that one on its own and prune it."
    return f"it is made by {made}, which none of {', '.join(WITH_TEXT)} loads; give a decoder-only language model."
