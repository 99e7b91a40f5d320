"""Quantised checkpoints: told by their configuration, or by how their weights are stored; dequantised on request.

A configuration that names no quantisation is not enough. transformers casts whatever a file holds to the dtype asked
for, so that 8-bit weights without the configuration that says how to scale them become numbers that are simply wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import nmbench

PLAIN = ("F64", "F32", "F16", "BF16")
SMALL = ("F8_", "F4", "F6_")  # how the names of dtypes begin that weights have only if they are quantised


def quantisation(config: Any) -> dict[str, Any] | None:
    """What the configuration of a model says of how its weights are quantised; None if they are not."""
    parts = (config, getattr(config, "text_config", None))
    found = next((q for part in parts if (q := getattr(part, "quantization_config", None))), None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def kind_of(about: Mapping[str, Any]) -> str:
    """The method of a quantisation, and its bits where they are told: `gptq, 4 bits`."""
    bits = about.get("bits") or about.get("num_bits")
    return f"{about.get('quant_method', 'unknown')}{f', {bits} bits' if bits else ''}"


def refuse(about: Mapping[str, Any], ref: str) -> None:
    """Raise `NMBenchError` saying what was found and what can be done."""
    raise nmbench.NMBenchError(
        f"model {ref} is quantised ({kind_of(about)}); prune the checkpoint that it was made from, whose weights are "
        f"plain numbers, and quantise afterwards; or go on with --dequantise."
    )


def ask_for_numbers(config: Any, about: dict[str, Any]) -> None:
    """Have transformers dequantise the weights while it loads them, if the method can; else nothing changes."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(about.get("quant_method"))
    if kind is not None and "dequantize" in inspect.signature(kind.__init__).parameters:
        config.quantization_config = {**about, "dequantize": True}


def with_numbers(model: Any, about: Mapping[str, Any], ref: str) -> Any:
    """A loaded model without quantised weights. Raises `NMBenchError` if its method cannot do that."""
    if getattr(model, "hf_quantizer", None) is None:
        return model
    try:
        return model.dequantize()
    except NotImplementedError:
        raise nmbench.NMBenchError(
            f"model {ref} is quantised ({kind_of(about)}), which transformers cannot dequantise; prune the checkpoint "
            f"that it was made from."
        ) from None


def check_stored(model: Any, files: Iterable[Path], unused: Iterable[str], about: Mapping[str, Any], ref: str) -> None:
    """Raise `NMBenchError` if weights were loaded that are no plain numbers.

    `files` are those that hold them; `unused` are the names in them that `model` does not know: numbers beside a weight
    that is there say how to read it, and nobody did. `about` is the quantisation that transformers undid.
    """
    stored = {} if about else {name: dtype for file in files for name, dtype in quantised_tensors(file)}
    if stored:
        name, dtype = next(iter(stored.items()))
        raise nmbench.NMBenchError(
            f"model {ref} holds {len(stored)} quantised weights, first {name} ({dtype}), and its configuration does "
            f"not say how they are; prune the checkpoint that it was made from."
        )
    weights = {name.removesuffix(".weight") for name, parameter in model.named_parameters() if parameter.dim() >= 2}
    beside = [name for name in unused if name.rpartition(".")[0] in weights and not name.endswith(".bias")]
    if beside:
        raise nmbench.NMBenchError(
            f"model {ref} has {sorted(beside)[0]} ({len(beside)} of this kind) beside a weight, which transformers "
            f"does not use: is it quantised? Its configuration does not say so; prune the checkpoint that it was made "
            f"from."
        )


def quantised_tensors(file: Path) -> list[tuple[str, str]]:
    """Names and dtypes of the weights in a safetensors file that are stored in less than 16 bits, or as integers."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        names = tensors.keys()
        dtypes = {name: str(tensors.get_slice(name).get_dtype()) for name in names}
    return [(n, d) for n, d in dtypes.items() if d.startswith(SMALL) or (n.endswith("weight") and d not in PLAIN)]
