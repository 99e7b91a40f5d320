"""Adapters, such as LoRA, in the folder of a model: refused, because neither the base nor the adapter is the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nmbench

CONFIG = "adapter_config.json"


def refuse_adapter(ref: str, name: str, where: Mapping[str, Any]) -> None:
    """Raise `NMBenchError` if the folder or the hub repository `name` holds an adapter, with the remedy.

    transformers drops an adapter without a word if peft is not installed, and adds its matrices to the layers
    otherwise, where they would be pruned like weights.
    """
    from transformers.utils import cached_file

    quiet = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
        "_raise_exceptions_for_gated_repo": False,
    }
    file = cached_file(name, CONFIG, **quiet, **where)
    if file is None:
        return
    kind, base = described(Path(file))
    raise nmbench.NMBenchError(
        f"model {ref} holds an adapter ({CONFIG}: {kind} of {base}), which has to be part of the weights before they "
        f"are pruned: merge it (peft: AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload()) and prune the "
        f"folder saved from that; to prune the base model alone, give a folder without {CONFIG}."
    )


def described(file: Path) -> tuple[str, str]:
    """Return the kind of an adapter and the name of its base model, as far as its configuration says them."""
    try:
        content = json.loads(file.read_bytes())
    except ValueError:
        content = {}
    about = content if isinstance(content, dict) else {}
    return str(about.get("peft_type") or "adapter"), str(about.get("base_model_name_or_path") or "an unnamed model")
