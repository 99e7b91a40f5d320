"""transformers models: of the hub (`hf:ORG/NAME`, `hf:ORG/NAME@REVISION`), of a folder, or of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import nmbench

WINDOW = 2048  # the field's window; max_position_embeddings (131072 on Llama 3.1) is not a usable default
DIGIT_BY_DIGIT = ("codeshell", "command-r", "refact", "smollm", "starcoder")  # values of tokenizer.ggml.pre


@dataclass(frozen=True)
class HubModel(nmbench.ModelSource):
    """A model of the Hugging Face hub; the commit that was loaded goes into the manifest."""

    def load(self, ref: str) -> nmbench.Bundle:
        name, _, revision = ref.partition("@")
        if not name:
            raise nmbench.NMBenchError("model hf: needs a name after the colon, for example hf:org/name@revision.")
        return read(f"hf:{ref}", name, self, {"revision": revision or "main"})


@dataclass(frozen=True)
class Folder(nmbench.ModelSource):
    """A folder written by `save_pretrained`; also taken when `--model` is just a path."""

    def load(self, ref: str) -> nmbench.Bundle:
        folder = Path(ref)
        if not folder.is_dir():
            raise nmbench.NMBenchError(
                f"model folder {ref} does not exist or is not a folder; for a GGUF file write gguf:{ref}."
            )
        if not (folder / "config.json").is_file():
            raise nmbench.NMBenchError(f"model folder {ref} has no config.json; it is not a transformers model.")
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            raise nmbench.NMBenchError(f"model folder {ref} has no weights (no *.safetensors, no *.bin).")
        return read(ref, str(folder), self, {"local_files_only": True})


@dataclass(frozen=True)
class Gguf(nmbench.ModelSource):
    """A GGUF file; its weights are dequantised (needs the package `gguf`)."""

    def load(self, ref: str) -> nmbench.Bundle:
        file = Path(ref)
        if not file.is_file():
            raise nmbench.NMBenchError(f"GGUF file {ref} does not exist.")
        where = {"gguf_file": file.name, "local_files_only": True}
        bundle = read(f"gguf:{ref}", str(file.parent), self, where)
        split_digits(bundle.tokenizer, file)
        return bundle


def read(ref: str, name: str, source: nmbench.ModelSource, where: Mapping[str, Any]) -> nmbench.Bundle:
    """Load model and tokenizer with transformers. Raises `NMBenchError` with what transformers says, on one line."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    trust = {"trust_remote_code": source.trust_remote_code}
    try:
        if "gguf_file" not in where:
            refuse_quantised(AutoConfig.from_pretrained(name, **where, **trust), ref)
        model, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=chosen_dtype(source.dtype), output_loading_info=True, **where, **trust
        )
        tokenizer = AutoTokenizer.from_pretrained(name, **where, **trust)
    except nmbench.NMBenchError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, ImportError and more
        raise nmbench.NMBenchError(f"cannot load model {ref}: {type(error).__name__}: {one_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise nmbench.NMBenchError(
            f"model {ref} has no weights for {missing[0]} ({len(missing)} missing); transformers would make them up."
        )
    return nmbench.Bundle.of(ref, model, tokenizer, defaults_of(model), provenance_of(model, where))


def refuse_quantised(config: Any, ref: str) -> None:
    """Raise `NMBenchError` if the weights of a checkpoint are quantised, by a method that its configuration names."""
    parts = (config, getattr(config, "text_config", None))
    found = next((q for part in parts if (q := getattr(part, "quantization_config", None))), None)
    if found:
        about = found if isinstance(found, dict) else found.to_dict()
        bits = about.get("bits") or about.get("num_bits")
        kind = f"{about.get('quant_method', 'unknown')}{f', {bits} bits' if bits else ''}"
        raise nmbench.NMBenchError(
            f"model {ref} is quantised ({kind}); prune the checkpoint that it was made from, whose weights are plain "
            f"numbers, and quantise afterwards."
        )


def split_digits(tokenizer: Any, file: Path) -> None:
    """Give back the rule that numbers are split into digits, which transformers drops when it reads a GGUF file."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(file).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() in DIGIT_BY_DIGIT:
        backend = tokenizer.backend_tokenizer
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])


def chosen_dtype(name: str | None) -> torch.dtype:
    """The dtype asked for; else bfloat16 on a GPU and float32 on a CPU, where bfloat16 is slow."""
    if name:
        return getattr(torch, name)
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def defaults_of(model: Any) -> nmbench.Defaults:
    """Windows of 2048 tokens, or the model's whole context if that is shorter."""
    context = getattr(model.config, "max_position_embeddings", WINDOW) or WINDOW
    window = min(WINDOW, context)
    return nmbench.Defaults(
        window_tokens=window,
        pool_tokens=128 * window,
        selection_tokens=32 * window,
        metrics=(f"ppl:wikitext2@{window}",),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def provenance_of(model: Any, where: Mapping[str, Any]) -> dict[str, Any]:
    """What was loaded: architecture, hub commit, and whether the file was quantised."""
    commit = getattr(model.config, "_commit_hash", None)
    quantised = {"dequantised_from": where["gguf_file"]} if "gguf_file" in where else {}
    return {"architecture": type(model).__name__, "revision": where.get("revision"), "commit": commit, **quantised}


def one_line(error: Exception) -> str:
    """The first line of what an exception says, shortened."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


@nmbench.hookimpl
def nmbench_register_models(register: nmbench.Register) -> None:
    register("hf", HubModel)
    register("folder", Folder)
    register("gguf", Gguf)
