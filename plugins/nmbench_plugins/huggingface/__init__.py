"""Model sources for transformers models: the hub (`hf:ORG/NAME`, `hf:ORG/NAME@REVISION`), a folder, a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import nmbench
from nmbench_plugins.huggingface.gguf_tokenizer import restore
from nmbench_plugins.huggingface.quantised import (
    check_stored,
    dequantised_model,
    kind_of,
    quantisation,
    refuse,
    request_dequantised,
)

WINDOW = 2048  # the field's window; max_position_embeddings (131072 on Llama 3.1) is not a usable default


@dataclass(frozen=True)
class HubModel(nmbench.ModelSource):
    """A model of the Hugging Face hub; the manifest records the commit that was loaded."""

    def load(self, ref: str) -> nmbench.Bundle:
        name, _, revision = ref.partition("@")
        if not name:
            raise nmbench.NMBenchError("model hf: needs a name after the colon, for example hf:org/name@revision.")
        return read(f"hf:{ref}", name, self, {"revision": revision or "main"})


@dataclass(frozen=True)
class Folder(nmbench.ModelSource):
    """A folder written by `save_pretrained`; `--model` with a path and no prefix means this source."""

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
        restore(bundle.tokenizer, file)
        return bundle


def read(ref: str, name: str, source: nmbench.ModelSource, where: Mapping[str, Any]) -> nmbench.Bundle:
    """Load model and tokenizer with transformers. Raises `NMBenchError` with the error of transformers on one line."""
    from transformers import AutoTokenizer

    trust = {"trust_remote_code": source.trust_remote_code}
    try:
        model, about = load(ref, name, source, where, trust)
        tokenizer = AutoTokenizer.from_pretrained(name, **where, **trust)
    except nmbench.NMBenchError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, ImportError and more
        raise nmbench.NMBenchError(f"cannot load model {ref}: {type(error).__name__}: {one_line(error)}") from error
    bundle = nmbench.Bundle.of(ref, model, tokenizer, None, provenance_of(model, where, about))
    bundle.defaults = defaults_of(bundle)
    return bundle


def load(
    ref: str, name: str, source: nmbench.ModelSource, where: Mapping[str, Any], trust: Mapping[str, bool]
) -> tuple[Any, dict[str, Any]]:
    """Return a model whose weights are complete and plain numbers, and the configuration of an undone quantisation.

    Raises `NMBenchError` for missing weights, and for quantised weights unless the source has `dequantise`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": chosen_dtype(source.dtype), "output_loading_info": True, **where, **trust}
    about: dict[str, Any] = {}
    if "gguf_file" not in where:
        config = AutoConfig.from_pretrained(name, **where, **trust)
        about = quantisation(config) or {}
        if about and not source.dequantise:
            refuse(about, ref)
        if about:
            request_dequantised(config, about)
            options["config"] = config
    model, report = AutoModelForCausalLM.from_pretrained(name, **options)
    if missing := sorted(report["missing_keys"]):
        raise nmbench.NMBenchError(
            f"model {ref} has no weights for {missing[0]} ({len(missing)} missing); transformers would make them up."
        )
    if "gguf_file" not in where:
        model = dequantised_model(model, about, ref)
        check_stored(model, weight_files(name, where), report["unexpected_keys"], about, ref)
    return model, about


def weight_files(name: str, where: Mapping[str, Any]) -> list[Path]:
    """Return the safetensors files of a model that has been loaded."""
    from transformers.utils import cached_file

    config = cached_file(name, "config.json", **where)
    return sorted(Path(config).parent.glob("model*.safetensors")) if config else []


def chosen_dtype(name: str | None) -> torch.dtype:
    """Return the named dtype; without a name bfloat16 on a GPU, and float32 on a CPU, where bfloat16 is slow."""
    if name:
        return getattr(torch, name)
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def defaults_of(bundle: nmbench.Bundle) -> nmbench.Defaults:
    """Return defaults with windows of 2048 tokens, or of the model's whole context if that context is shorter."""
    window = min(WINDOW, bundle.context_tokens or WINDOW)
    return nmbench.Defaults(
        window_tokens=window,
        pool_tokens=128 * window,
        selection_tokens=32 * window,
        metrics=(f"ppl:wikitext2@{window}",),
        dtype=str(bundle.model.dtype).removeprefix("torch."),
    )


def provenance_of(model: Any, where: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the origin of a model for the record: architecture, hub commit, and the quantisation that was undone."""
    commit = getattr(model.config, "_commit_hash", None)
    origin = where.get("gguf_file") or (kind_of(about) if about else None)
    quantised = {"dequantised_from": origin} if origin else {}
    return {"architecture": type(model).__name__, "revision": where.get("revision"), "commit": commit, **quantised}


def one_line(error: Exception) -> str:
    """Return the text of an exception on one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


@nmbench.hookimpl
def nmbench_register_models(register: nmbench.Register) -> None:
    register("hf", HubModel)
    register("folder", Folder)
    register("gguf", Gguf)
