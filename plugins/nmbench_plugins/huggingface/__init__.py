"""Model sources for transformers models: the hub (`hf:ORG/NAME`, `hf:ORG/NAME@REVISION`), a folder, a GGUF file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, ClassVar

import nmbench
from nmbench_plugins.huggingface.adapters import BESIDE, Adapter, check_peft, merged, refuse_adapter, without_adapter
from nmbench_plugins.huggingface.gguf_tokenizer import restore
from nmbench_plugins.huggingface.outline import outline_of_folder, outline_of_hub
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

if TYPE_CHECKING:
    import torch

WINDOW = 2048  # the field's window; max_position_embeddings (131072 on Llama 3.1) is not a usable default


@dataclass(frozen=True)
class HubModel(nmbench.ModelSource):
    """A model of the Hugging Face hub; the manifest records the commit that was loaded."""

    merges_adapters: ClassVar[bool] = True
    outline = outline_of_hub

    def load(self, ref: str) -> nmbench.Bundle:
        name, _, revision = ref.partition("@")
        if not name:
            raise nmbench.NMBenchError("model hf: needs a name after the colon, for example hf:org/name@revision.")
        if self.merge_adapter == BESIDE:
            raise nmbench.NMBenchError(
                f"no adapter lies beside a model of the hub; give its folder: --model hf:{ref} --merge-adapter FOLDER."
            )
        return with_adapter(read(f"hf:{ref}", name, self, {"revision": revision or "main"}), self.merge_adapter)


@dataclass(frozen=True)
class Folder(nmbench.ModelSource):
    """A folder written by `save_pretrained`; `--model` with a path and no prefix means this source."""

    merges_adapters: ClassVar[bool] = True
    outline = outline_of_folder

    def load(self, ref: str) -> nmbench.Bundle:
        folder = Path(ref)
        if not folder.is_dir():
            raise nmbench.NMBenchError(
                f"model folder {ref} does not exist or is not a folder; for a GGUF file write gguf:{ref}."
            )
        if self.merge_adapter == BESIDE:
            return self.load_beside(ref, folder)
        return with_adapter(self.load_folder(ref, folder), self.merge_adapter)

    def load_beside(self, ref: str, folder: Path) -> nmbench.Bundle:
        """Return the model in a folder with the adapter beside it, or the model that the adapter alone names."""
        adapter = Adapter.at(folder)
        check_peft(adapter)
        if not (folder / "config.json").is_file():
            bundle = self.load_folder(ref, adapter.base_folder())
            if any(folder.glob("tokenizer*")):
                bundle.tokenizer = tokenizer_of(ref, folder, self)
            return with_adapter(bundle, str(folder))
        with without_adapter(folder) as model:
            return with_adapter(self.load_folder(ref, model), str(folder))

    def load_folder(self, ref: str, folder: Path) -> nmbench.Bundle:
        """Return the model in `folder`; `ref` names it in messages."""
        from nmbench.runtime import offline

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

    from nmbench.runtime import hub_or_cache, offline

    trust = {"trust_remote_code": source.trust_remote_code}
    with offline() if where.get("local_files_only") else hub_or_cache() as unreached:
        try:
            loaded = load(ref, name, source, where, trust)
            tokenizer = AutoTokenizer.from_pretrained(name, **where, **trust)
        except nmbench.NMBenchError:
            raise
        except Exception as error:  # transformers raises OSError, ValueError, ImportError and more
            raise nmbench.NMBenchError(reason(error, ref, str(unreached or ""))) from error
    bundle = nmbench.Bundle.of(ref, loaded.model, tokenizer, None, provenance_of(loaded, where))
    bundle.defaults = defaults_of(bundle)
    bundle.provenance = {**bundle.provenance, **left_out(bundle, loaded.unused, source.trust_remote_code)}
    return bundle


def reason(error: Exception, ref: str, unreached: str = "") -> str:
    """Return why a model cannot be loaded, with the remedy for code that would have to run.

    `unreached`: why the hub could not be asked; empty if it was.
    """
    if "trust_remote_code=True" in str(error):
        return f"model {ref} brings code of its own; read the code, and allow it to run by --trust-remote-code."
    if isinstance(error, UnpicklingError):
        return (
            f"cannot load model {ref}: its weight file is damaged, or holds more than tensors, which could run code; "
            f"bring its weights as safetensors."
        )
    cached = f"{unreached}; and from its cache: " if unreached else ""
    return f"cannot load model {ref}: {cached}{type(error).__name__}: {one_line(error)}"


def tokenizer_of(ref: str, folder: Path, source: nmbench.ModelSource) -> Any:
    """Return the tokenizer in a folder. Raises `NMBenchError` with the error of transformers on one line."""
    from transformers import AutoTokenizer

    from nmbench.runtime import offline

    try:
        with offline():
            return AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=source.trust_remote_code
            )
    except Exception as error:
        raise nmbench.NMBenchError(reason(error, ref)) from error


def with_adapter(bundle: nmbench.Bundle, folder: str | None) -> nmbench.Bundle:
    """Return a bundle of the same model with the adapter in `folder`, if one is asked for, merged into its weights."""
    if folder is None:
        return bundle
    adapter = Adapter.at(Path(folder).expanduser())
    check_peft(adapter)
    model = merged(bundle.model, adapter, bundle.ref)
    origin = {"merged_adapter": {"folder": str(adapter.folder), "kind": adapter.kind, "made_for": adapter.base}}
    provenance = {**bundle.provenance, **origin}
    return nmbench.Bundle.of(bundle.ref, model, bundle.tokenizer, bundle.defaults, provenance)


@dataclass(frozen=True)
class Loaded:
    """A model with plain numbers, the configuration of an undone quantisation, and the dtype of the files' weights.

    `unused`: names of tensors in the files that the model has no place for.
    """

    model: Any
    about: Mapping[str, Any] = field(default_factory=dict)
    stored_dtype: str | None = None
    unused: tuple[str, ...] = ()


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
    return Loaded(model, about, None if about else usual_dtype(tensors), tuple(unused))


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
    import torch

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


BUFFERS = ("inv_freq", "masked_bias", "attn.bias", "attention.bias")  # that older versions of transformers stored


def left_out(bundle: nmbench.Bundle, unused: Iterable[str], own_code: bool) -> dict[str, Any]:
    """Return what of a folder has no part in the loaded model, for the record: the run doubts its figures then.

    `unread_tensors`: number and first name of the `unused` tensors of decoder blocks; `code_not_run`: the class that
    the folder brings, where a class of transformers was loaded because `own_code` is not allowed.
    """
    stack = next(iter(bundle.blocks)).rpartition(".")[0]
    places = {f"{stack}.", f"{stack.removeprefix(f'{bundle.model.base_model_prefix}.')}."}
    inside = [name for name in unused if any(f".{name}".find(f".{place}") >= 0 for place in places)]
    inside = sorted(name for name in inside if not name.endswith(BUFFERS))
    classes = getattr(bundle.model.config, "auto_map", None) or {}
    code = None if own_code else next((str(c) for name, c in classes.items() if name.startswith("AutoModel")), None)
    return {
        **({"unread_tensors": {"number": len(inside), "first": inside[0]}} if inside else {}),
        **({"code_not_run": code} if code else {}),
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
