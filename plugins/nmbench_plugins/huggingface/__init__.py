"""Model sources for transformers models: the hub (`hf:ORG/NAME`, `hf:ORG/NAME@REVISION`), a folder, a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import nmbench
from nmbench.runtime import hub_or_cache, offline
from nmbench_plugins.huggingface.adapters import refuse_adapter
from nmbench_plugins.huggingface.gguf_tokenizer import restore
from nmbench_plugins.huggingface.quantised import (
    check_stored,
    dequantised_model,
    forget_quantisation,
    kind_of,
    plain_model,
    quantisation,
    refuse,
    request_dequantised,
)
from nmbench_plugins.huggingface.weight_files import stored_tensors, usual_dtype, weight_files

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
            with offline():
                refuse_adapter(ref, str(folder), {"local_files_only": True})
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
    """Load model and tokenizer with transformers, those of the hub from its cache if the hub does not answer.

    Raises `NMBenchError` with the error of transformers on one line.
    """
    from transformers import AutoTokenizer

    trust = {"trust_remote_code": source.trust_remote_code}
    with offline() if where.get("local_files_only") else hub_or_cache() as unreached:
        try:
            loaded = load(ref, name, source, where, trust)
            tokenizer = AutoTokenizer.from_pretrained(name, **where, **trust)
        except nmbench.NMBenchError:
            raise
        except Exception as error:  # transformers raises OSError, ValueError, ImportError and more
            cached = f"{unreached}; and from its cache: " if unreached else ""
            text = f"{cached}{type(error).__name__}: {one_line(error)}"
            raise nmbench.NMBenchError(f"cannot load model {ref}: {text}") from error
    bundle = nmbench.Bundle.of(ref, loaded.model, tokenizer, None, provenance_of(loaded, where))
    bundle.defaults = defaults_of(bundle)
    return bundle


@dataclass(frozen=True)
class Loaded:
    """A model with plain numbers, the configuration of an undone quantisation, and the dtype of the files' weights."""

    model: Any
    about: Mapping[str, Any] = field(default_factory=dict)
    stored_dtype: str | None = None


def load(
    ref: str, name: str, source: nmbench.ModelSource, where: Mapping[str, Any], trust: Mapping[str, bool]
) -> Loaded:
    """Return a model whose weights are complete and plain numbers.

    Raises `NMBenchError` for an adapter, for a model that is no causal language model, for missing weights, and for
    quantised weights unless the source has `dequantise`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": chosen_dtype(source.dtype), "output_loading_info": True, **where, **trust}
    if "gguf_file" in where:
        return Loaded(plain_model(complete(AutoModelForCausalLM.from_pretrained(name, **options), ref)[0]))
    refuse_adapter(ref, name, where)
    config = AutoConfig.from_pretrained(name, **where, **trust)
    about = quantisation(config, ref) or {}
    if about and not source.dequantise:
        refuse(about, ref)
    if about:
        request_dequantised(config, about)
    else:
        forget_quantisation(config)
    model, unused = complete(nmbench.auto_class(config, ref).from_pretrained(name, config=config, **options), ref)
    model = dequantised_model(model, about, ref)
    tensors = list(stored_tensors(files_of(name, config, where)))
    check_stored(model, tensors, unused, about, ref)
    return Loaded(model, about, None if about else usual_dtype(tensors))


def complete(loaded: tuple[Any, Mapping[str, Any]], ref: str) -> tuple[Any, list[str]]:
    """Return a loaded model and the stored names that it does not use. Raises `NMBenchError` for missing weights."""
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise nmbench.NMBenchError(
            f"model {ref} has no weights for {missing[0]} ({len(missing)} missing); transformers would make them up."
        )
    return model, list(report["unexpected_keys"])


def files_of(name: str, config: Any, where: Mapping[str, Any]) -> list[Path]:
    """Return the files that transformers has loaded the weights of a model from."""
    from transformers.utils import cached_file

    file = cached_file(name, "config.json", **where)
    return weight_files(Path(file).parent, getattr(config, "transformers_weights", None)) if file else []


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
        metrics=(f"ppl:wikitext2@{window}", f"ppl:c4@{window}"),  # two domains
        dtype=str(bundle.model.dtype).removeprefix("torch."),
    )


def provenance_of(loaded: Loaded, where: Mapping[str, Any]) -> dict[str, Any]:
    """Return the origin of a model for the record: architecture, commit, dtype of the files, quantisation undone."""
    commit = getattr(loaded.model.config, "_commit_hash", None)
    origin = where.get("gguf_file") or (kind_of(loaded.about) if loaded.about else None)
    return {
        "architecture": type(loaded.model).__name__,
        "revision": where.get("revision"),
        "commit": commit,
        **({"stored_dtype": loaded.stored_dtype} if loaded.stored_dtype else {}),
        **({"dequantised_from": origin} if origin else {}),
    }


def one_line(error: Exception) -> str:
    """Return the text of an exception on one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


@nmbench.hookimpl
def nmbench_register_models(register: nmbench.Register) -> None:
    register("hf", HubModel)
    register("folder", Folder)
    register("gguf", Gguf)
