"""Adapters, such as LoRA: merged into the weights on request (by peft), else refused.

Neither the base nor the adapter is the model, and an adapter that is not merged would be lost, or pruned like weights.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nmbench

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
BESIDE = "beside"  # the value of --merge-adapter for the adapter in the folder of the model
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PROBE_TOKENS = 16
MOST_ERROR = 1e-4  # of merged logits, relative
MOST_ERROR_OF_HALVES = 0.05


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk: its folder, its kind (`LORA`), and the name of the model that it was made for."""

    folder: Path
    kind: str
    base: str

    @classmethod
    def at(cls, folder: Path) -> Adapter:
        """Return the adapter in a folder. Raises `NMBenchError` if there is none."""
        if not (folder / CONFIG).is_file() or not any((folder / name).is_file() for name in WEIGHTS):
            raise nmbench.NMBenchError(
                f"--merge-adapter {folder} is no folder of an adapter: it needs {CONFIG} and {WEIGHTS[0]}, as peft's "
                f"save_pretrained writes them."
            )
        return cls(folder, *described(folder / CONFIG))

    def base_folder(self) -> Path:
        """Return the folder of the model that the adapter was made for, by its own path or from the adapter's folder.

        Raises `NMBenchError` if it is no folder on this machine.
        """
        for path in (Path(self.base).expanduser(), self.folder / self.base):
            if (path / "config.json").is_file():
                return path
        raise nmbench.NMBenchError(
            f"adapter {self.folder} was made for {self.base}, which is no model folder here; give it by --model (a "
            f"folder, or hf:ORG/NAME for a model of the hub) and the adapter by --merge-adapter {self.folder}."
        )


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
    remedy = "--merge-adapter" if Path(name).is_dir() else "--merge-adapter FOLDER and its base by --model"
    raise nmbench.NMBenchError(
        f"model {ref} holds an adapter ({CONFIG}: {kind} of {base}), which has to be part of the weights before they "
        f"are pruned: merge it by {remedy}; to prune the base model alone, give a folder without {CONFIG}."
    )


def described(file: Path) -> tuple[str, str]:
    """Return the kind of an adapter and the name of its base model, as far as its configuration says them."""
    try:
        content = json.loads(file.read_bytes())
    except ValueError:
        content = {}
    about = content if isinstance(content, dict) else {}
    return str(about.get("peft_type") or "adapter"), str(about.get("base_model_name_or_path") or "an unnamed model")


@contextlib.contextmanager
def without_adapter(folder: Path) -> Iterator[Path]:
    """Open a folder of links to the files of a model, but for those of the adapter beside it.

    transformers attaches an adapter that it finds beside a model if peft is installed.
    """
    with tempfile.TemporaryDirectory() as name:
        for file in folder.iterdir():
            if file.name not in (CONFIG, *WEIGHTS):
                Path(name, file.name).symlink_to(file.absolute())
        yield Path(name)


def check_peft(adapter: Adapter) -> None:
    """Raise `NMBenchError` if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise nmbench.NMBenchError(
            f"merging the adapter {adapter.folder} needs the package peft: pip install 'nmbench[peft]'."
        )


def merged(model: Any, adapter: Adapter, ref: str) -> Any:
    """Return `model` with the adapter merged into its weights.

    Raises `NMBenchError` for an adapter that does not fit the model, for one that cannot be merged, such as learnt
    prompts, and for one whose merged weights compute other logits than the model with the adapter beside it.
    """
    from peft import PeftModel

    model.eval()
    what = f"adapter {adapter.folder} cannot be merged into {ref}"
    with failing_as(what), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys that do not fit: found below
        beside = PeftModel.from_pretrained(model, str(adapter.folder), torch_device="cpu")
    if not hasattr(beside.base_model, "merge_and_unload"):
        raise nmbench.NMBenchError(f"{what}: {adapter.kind} is not of a kind that weights can hold; prune the base.")
    check_fits(beside, adapter, what)
    with failing_as(what), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights: found below
        expected = logits_of(beside)
        whole = beside.merge_and_unload(safe_merge=True)
        check_merged(expected, logits_of(whole), what)
    return whole


def check_fits(beside: Any, adapter: Adapter, what: str) -> None:
    """Raise `NMBenchError` if names in the file of the adapter are not those that the model with it has."""
    from peft import get_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    stored = set(load_peft_weights(str(adapter.folder), device="cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        needed = set(get_peft_model_state_dict(beside, save_embedding_layers=False))
    own = {f"base_model.model.{name}" for name in beside.get_base_model().state_dict()}
    if odd := sorted((needed ^ stored) - own):
        problem = "is not in its file" if odd[0] in needed else "belongs to no layer of the model"
        raise nmbench.NMBenchError(
            f"{what}: {odd[0]} ({len(odd)} of this kind) {problem}; give the model it was made for, {adapter.base}."
        )


def logits_of(model: Any) -> Tensor:
    """Return the logits of a few tokens, `[1, n, vocabulary]` in the dtype of the model."""
    import torch

    rows = model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        return model(input_ids=torch.arange(min(PROBE_TOKENS, rows))[None]).logits


def check_merged(expected: Tensor, found: Tensor, what: str) -> None:
    """Raise `NMBenchError` if merged weights compute other logits than the adapter beside the weights."""
    most = MOST_ERROR if expected.dtype.itemsize >= 4 else MOST_ERROR_OF_HALVES
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    if not error <= most:
        raise nmbench.NMBenchError(
            f"{what}: with merged weights the logits are other ones (relative difference {error:.1g}), as where it "
            f"adapts a weight that two layers share; merge it into a model without tied weights."
        )


@contextlib.contextmanager
def failing_as(what: str) -> Iterator[None]:
    """Raise `NMBenchError` in place of any exception of peft."""
    try:
        yield
    except nmbench.NMBenchError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise nmbench.NMBenchError(f"{what}: {type(error).__name__}: {text:.300}") from error
