"""Detection of quantised checkpoints by configuration or by stored dtypes, and dequantisation on request.

A configuration that names no quantisation is no proof of plain weights. transformers casts every stored tensor to the
requested dtype, so that 8-bit weights whose configuration lacks the scales become wrong numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import nmbench
from nmbench_plugins.huggingface.weight_files import Stored

PLAIN = ("F64", "F32", "F16", "BF16")
SMALL = ("F8_", "F4", "F6_", "float8", "float4")  # beginnings of names of dtypes that only quantised weights have
DENSE = "dense"  # the format of compressed-tensors that stores zeros


def quantisation(config: Any, ref: str) -> dict[str, Any] | None:
    """Return the quantisation in the configuration of a model; None if its weights are stored as plain numbers.

    Raises `NMBenchError` for weights that are stored compressed, without their zeros.
    """
    found = next((q for part in parts(config) if (q := getattr(part, "quantization_config", None))), None)
    about = found if found is None or isinstance(found, dict) else found.to_dict()
    if about is None or not only_sparse(about):
        return about
    layout = (about.get("sparsity_config") or {}).get("format") or about.get("format") or DENSE
    if layout != DENSE:
        raise nmbench.NMBenchError(
            f"model {ref} is stored in the compressed format {layout!r} of compressed-tensors, without its zeros; "
            f"save it decompressed (format {DENSE!r}) and give that folder."
        )
    return None


def parts(config: Any) -> tuple[Any, ...]:
    """Return a configuration and that of its decoder of text, which may be the same one."""
    return config, getattr(config, "text_config", None)


def only_sparse(about: Mapping[str, Any]) -> bool:
    """True if the configuration is one of compressed-tensors that names no weights to quantise, but may name zeros."""
    groups = (about.get("config_groups") or {}).values()
    weights = [group for group in groups if not isinstance(group, Mapping) or group.get("weights")]
    return about.get("quant_method") == "compressed-tensors" and not weights


def forget_quantisation(config: Any) -> None:
    """Remove the configuration of a quantisation that there is not, on which transformers would act."""
    for part in parts(config):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config


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
    if not about:
        return plain_model(model)
    try:
        return model.dequantize()
    except NotImplementedError:
        raise nmbench.NMBenchError(
            f"model {ref} is quantised ({kind_of(about)}), which transformers cannot dequantise; prune the checkpoint "
            f"that it was made from."
        ) from None


def plain_model(model: Any) -> Any:
    """Return a loaded model whose weights are plain numbers, without what says that they were quantised in its file.

    transformers would refuse to save it.
    """
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    return model


def check_stored(
    model: Any, tensors: Iterable[Stored], unused: Iterable[str], about: Mapping[str, Any], ref: str
) -> None:
    """Raise `NMBenchError` if transformers loaded weights that are not plain numbers.

    `tensors` are those of the weight files; `unused` are the names that `model` does not have. An unused tensor beside
    a weight is a sign of a quantisation, such as a scale, that was not undone. `about` is the quantisation that
    transformers undid.
    """
    if stored := [] if about else quantised_tensors(model, tensors):
        raise nmbench.NMBenchError(
            f"model {ref} holds {len(stored)} quantised weights, first {stored[0].name} ({stored[0].dtype}), and its "
            f"configuration does not name the quantisation; prune the checkpoint that it was made from."
        )
    weights = {name.removesuffix(".weight") for name, parameter in model.named_parameters() if parameter.dim() >= 2}
    beside = [name for name in unused if name.rpartition(".")[0] in weights and not name.endswith(".bias")]
    if beside:
        raise nmbench.NMBenchError(
            f"model {ref} has {sorted(beside)[0]} ({len(beside)} of this kind) beside a weight, which transformers "
            f"does not use: the weight may be quantised, although the configuration names no quantisation; prune the "
            f"checkpoint that it was made from."
        )


def quantised_tensors(model: Any, tensors: Iterable[Stored]) -> list[Stored]:
    """Return the tensors with fewer than 16 bits, and those that are stored as integers but are weights of `model`."""
    names = nmbench.StoredNames.of(model)
    weights = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.dim() >= 2}
    return [
        tensor
        for tensor in tensors
        if tensor.dtype.startswith(SMALL) or (tensor.dtype not in PLAIN and names.target(tensor.name)[0] in weights)
    ]
