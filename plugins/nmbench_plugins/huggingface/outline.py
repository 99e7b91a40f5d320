"""The outline of a transformers model: its modules and shapes by its configuration, without weights."""

from __future__ import annotations

from typing import Any

import nmbench


def outline_of_folder(source: nmbench.ModelSource, ref: str) -> nmbench.Bundle | None:
    """Return the model in a folder, an instance of `Folder`, on the meta device; None if it is no plain model."""
    return outline(source, ref, ref, {"local_files_only": True})


def outline_of_hub(source: nmbench.ModelSource, ref: str) -> nmbench.Bundle | None:
    """Return a model of the hub on the meta device; None if it is no plain model."""
    name, _, revision = ref.partition("@")
    return outline(source, f"hf:{ref}", name, {"revision": revision or "main"})


def outline(source: nmbench.ModelSource, ref: str, name: str, where: dict[str, Any]) -> nmbench.Bundle | None:
    """Return a bundle without weights and tokenizer; None for quantised weights, whose dtype is not known."""
    import torch
    from transformers import AutoConfig

    from nmbench.runtime import hub_or_cache, offline
    from nmbench_plugins.huggingface import chosen_dtype, defaults_of
    from nmbench_plugins.huggingface.quantised import quantisation

    with offline() if where.get("local_files_only") else hub_or_cache():
        config = AutoConfig.from_pretrained(name, trust_remote_code=source.trust_remote_code, **where)
    if quantisation(config, ref):
        return None
    dtype = chosen_dtype(source.dtype)
    with torch.device("meta"):
        model = nmbench.auto_class(config, ref).from_config(
            config, dtype=dtype, trust_remote_code=source.trust_remote_code
        )
    bundle = nmbench.Bundle.of(ref, model, None)
    bundle.defaults = defaults_of(bundle)
    return bundle
