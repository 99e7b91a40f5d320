"""The files of a model in an export: written as an engine reads them, and read back against the live model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from torch import nn

from nmbench.artifacts.decoder_scope import silencing
from nmbench.errors import NMBenchError
from nmbench.experiment.loading import no_loading_bar
from nmbench.methods import PrunedModel
from nmbench.models.bit_equality import same_bits
from nmbench.models.bundle import Bundle
from nmbench.models.stored_names import StoredNames
from nmbench.pattern import Pattern
from nmbench.runtime import dtype_name, load_packed, save_packed
from nmbench.runtime.packed import packed_layers

VESTIGES = ("sparsity_config", "compression_config", "quantization_config")  # keys on which loaders would act
SHARD = "5GB"


def write_dense(bundle: Bundle, pruned: PrunedModel, patterns: Mapping[str, Pattern], folder: Path) -> None:
    """Write weights, configuration and tokenizer by transformers, without `VESTIGES` of other compressions."""
    with silencing(), no_loading_bar():
        bundle.model.save_pretrained(  # type: ignore[operator]
            folder, max_shard_size=SHARD, save_original_format=not fused(bundle)
        )
        bundle.tokenizer.save_pretrained(folder)
    edit_config(folder, {})


def write_packed(bundle: Bundle, pruned: PrunedModel, patterns: Mapping[str, Pattern], folder: Path) -> None:
    """Write packed weights for `nmbench.runtime.load_packed`, configuration and tokenizer."""
    model: Any = bundle.model
    with silencing():
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        bundle.tokenizer.save_pretrained(folder)
    edit_config(folder, {"architectures": [type(model).__name__], "dtype": dtype_name(bundle.dtype)})
    save_packed(model, {n: (patterns[n], layer.mask) for n, layer in pruned.layers.items()}, folder)


def edit_config(folder: Path, more: Mapping[str, Any]) -> None:
    """Add entries to `config.json`, and remove `VESTIGES` that `more` does not have."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in config.items() if name not in VESTIGES}
    path.write_text(json.dumps({**kept, **more}, indent=2) + "\n", encoding="utf-8")


def fused(bundle: Bundle) -> bool:
    """True if some layers are fused experts of one parameter, `path[3]`, which older formats store separately."""
    return any(layer.fused for layer in bundle.layers.values())


def check_dense(folder: Path, model: nn.Module) -> None:
    """Raise `NMBenchError` if the parameters in a folder, read as transformers reads them, are not those of `model`."""
    names, live = StoredNames.of(model), model.state_dict()
    written = set()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safetensors.safe_open(f, framework="pt")) for f in folder.glob("*.safetensors")]
        holder = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        for parts in names.parts(holder):
            for name, value in names.read(parts, lambda stored: holder[stored].get_tensor(stored)):
                if not same_bits(value, live[name].cpu()):
                    raise NMBenchError(f"{name} differs from the model after writing; the folder was removed.")
                written.add(name)
    tied = {live[name].data_ptr() for name in written}
    if missing := [name for name in live if name not in written and live[name].data_ptr() not in tied]:
        raise NMBenchError(f"{missing[0]} is not in the folder after writing; the folder was removed.")


def check_packed(folder: Path, model: nn.Module) -> None:
    """Raise `NMBenchError` if the model that `load_packed` makes of a folder does not hold the tensors of `model`."""
    loaded = load_packed(folder)
    layers, state = packed_layers(loaded), loaded.state_dict()
    for name, value in model.state_dict().items():
        layer, _, own = name.rpartition(".")
        found = layers[layer].weight if layer in layers and own == "weight" else state.get(name)
        if found is None or not same_bits(found.contiguous(), value.cpu().contiguous()):
            raise NMBenchError(f"{name} differs from the model after packing; the folder was removed.")
