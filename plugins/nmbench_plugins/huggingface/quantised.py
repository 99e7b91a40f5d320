"""Detection of quantised checkpoints by configuration or by stored dtypes, and dequantisation on request.

A configuration that names no quantisation is no proof of plain weights. transformers casts every stored tensor to the
requested dtype, so that 8-bit weights whose configuration lacks the scales become wrong numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import nmbench

PLAIN = ("F64", "F32", "F16", "BF16")
SMALL = ("F8_", "F4", "F6_")  # beginnings of the names of dtypes that only quantised weights have


def quantisation(config: Any) -> dict[str, Any] | None:
    """Return the quantisation in the configuration of a model; None if the configuration has none."""
    parts = (config, getattr(config, "text_config", None))
    found = next((q for part in parts if (q := getattr(part, "quantization_config", None))), None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def kind_of(about: Mapping[str, Any]) -> str:
    """Return the method of a quantisation, with its bits where the configuration names them: `gptq, 4 bits`."""
    bits = about.get("bits") or about.get("num_bits")
    return f"{about.get('quant_method', 'unknown')}{f', {bits} bits' if bits else ''}"


def refuse(about: Mapping[str, Any], ref: str) -> None:
    """Raise `NMBenchError` with the kind of quantisation and the remedies."""
    raise nmbench.NMBenchError(
        f"model {ref} is quantised ({kind_of(about)}); prune the checkpoint that it was made from, whose weights are "
        f"plain numbers, and quantise afterwards; or go on with --dequantise."
    )


def request_dequantised(config: Any, about: dict[str, Any]) -> None:
    """Configure transformers to dequantise weights while loading, if the method of the quantisation supports this."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(about.get("quant_method"))
    if kind is not None and "dequantize" in inspect.signature(kind.__init__).parameters:
        config.quantization_config = {**about, "dequantize": True}


def dequantised_model(model: Any, about: Mapping[str, Any], ref: str) -> Any:
    """Return a loaded model with dequantised weights. Raises `NMBenchError` if transformers cannot dequantise."""
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
    """Raise `NMBenchError` if transformers loaded weights that are not plain numbers.

    `files` hold the weights; `unused` are the names in `files` that `model` does not have. An unused tensor beside a
    weight is a sign of a quantisation, such as a scale, that was not undone. `about` is the quantisation that
    transformers undid.
    """
    stored = {} if about else {name: dtype for file in files for name, dtype in quantised_tensors(file)}
    if stored:
        name, dtype = next(iter(stored.items()))
        raise nmbench.NMBenchError(
            f"model {ref} holds {len(stored)} quantised weights, first {name} ({dtype}), and its configuration does "
            f"not name the quantisation; prune the checkpoint that it was made from."
        )
    weights = {name.removesuffix(".weight") for name, parameter in model.named_parameters() if parameter.dim() >= 2}
    beside = [name for name in unused if name.rpartition(".")[0] in weights and not name.endswith(".bias")]
    if beside:
        raise nmbench.NMBenchError(
            f"model {ref} has {sorted(beside)[0]} ({len(beside)} of this kind) beside a weight, which transformers "
            f"does not use: the weight may be quantised, although the configuration names no quantisation; prune the "
            f"checkpoint that it was made from."
        )


def quantised_tensors(file: Path) -> list[tuple[str, str]]:
    """Return names and dtypes of the weights in a safetensors file with fewer than 16 bits, or stored as integers."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        names = tensors.keys()
        dtypes = {name: str(tensors.get_slice(name).get_dtype()) for name in names}
    return [(n, d) for n, d in dtypes.items() if d.startswith(SMALL) or (n.endswith("weight") and d not in PLAIN)]
