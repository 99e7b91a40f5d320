"""A finished row as a folder that transformers loads: zeros in place, packed masks, provenance, a model card.

Loaders read every `*.safetensors` of a folder as weights, so files of nmbench lie in `nmbench/`. The folder is written
under a temporary name, read back, and renamed once the check has passed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import tomli_w
import torch
from torch import nn

from nmbench.artifacts.decoder_scope import silencing
from nmbench.artifacts.folder import MASKS
from nmbench.artifacts.kept_masks import file_digest
from nmbench.artifacts.model_card import model_card
from nmbench.artifacts.reading import open_artifact
from nmbench.artifacts.rebuilding import Row, make_again
from nmbench.artifacts.validation import BOTH, Validation, validate
from nmbench.errors import NMBenchError
from nmbench.experiment.loading import dtype_of, no_loading_bar
from nmbench.methods import PrunedModel
from nmbench.models.bit_equality import same_bits
from nmbench.models.bundle import Bundle
from nmbench.models.casting import cast_parameters
from nmbench.models.stored_names import StoredNames
from nmbench.plugins.loading import Plugins
from nmbench.results.files import cannot_write, save_masks

VESTIGES = ("sparsity_config", "compression_config", "quantization_config")  # keys on which loaders would act
SHARD = "5GB"


@dataclass(frozen=True)
class Written:
    """An export: what reading it back proved, and one sentence on weights that were rounded, empty without any."""

    validation: Validation
    rounded: str = ""


Check = Callable[[Path, Bundle, PrunedModel], Validation]  # folder, live model, masks


def export(
    row: Row,
    target: Path,
    plugins: Plugins,
    device: str | None = None,
    check: Check | None = None,
    dtype: str | None = None,
) -> Written:
    """Write the model of a finished row to the new folder `target`; return what reading `target` back proved.

    `dtype` is the dtype of the weights in the folder, by default that of the checkpoint that was pruned. `check` stands
    in for `read_back`, so that tests can make the check fail.

    Raises `NMBenchError` if `target` exists or a weight is too large for `dtype`, `ModelChanged` or `NotReproduced` if
    the row cannot be made again bit by bit, `CannotWrite` if the disk refuses.
    """
    if target.exists():
        raise NMBenchError(f"{target} exists; give another folder with --to, or remove it.")
    asked = dtype_of(dtype) if dtype else None
    bundle, pruned = make_again(row, plugins, device)
    rounded = cast(bundle, asked or dtype_of(bundle.provenance.get("stored_dtype") or name_of(bundle.dtype)))
    with creating(target) as folder:
        write_model(bundle, folder)
        about = {**provenance(row, folder), **({"rounded": rounded} if rounded else {})}
        patterns = row.spec.layer_patterns(row.spec.patterns[0], pruned.masks)
        save_masks(folder / MASKS, pruned.masks, patterns, about)
        found = (check or read_back)(folder, bundle, pruned)
        write_about(row, folder, about, found)
    return Written(found, rounded)


def cast(bundle: Bundle, dtype: torch.dtype) -> str:
    """Cast the model in place; return a sentence on the weights that changed by it, empty if none did.

    Masked weights of a checkpoint in `dtype` do not change; repaired weights are rounded. Raises `NMBenchError` if a
    weight is too large for `dtype`.
    """
    if dtype == bundle.dtype:
        return ""
    source = bundle.dtype
    before = {name: parameter.data for name, parameter in bundle.model.named_parameters()}
    cast_parameters(bundle.model, dtype)
    changed = 0
    for name, parameter in bundle.model.named_parameters():
        if not parameter.isfinite().all():
            raise NMBenchError(
                f"{name} holds weights too large for {name_of(dtype)}; export with --dtype {name_of(source)}."
            )
        changed += int((parameter.to(before[name].dtype) != before[name]).sum())
    if not changed:
        return ""
    return f"{changed} weights were rounded to {name_of(dtype)}; they were measured as {name_of(source)}."


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def creating(target: Path) -> Iterator[Path]:
    """Open a temporary folder that is synced and renamed to `target` at the end, or removed after an error."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        probe = temporary / "probe"
        probe.touch()
        usual = probe.stat().st_mode  # some libraries write files that only their owner can read
        probe.unlink()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(usual)
                with file.open("r+b") as opened:
                    os.fsync(opened.fileno())
        if target.exists():
            raise NMBenchError(f"{target} has come into being meanwhile; it was left as it is.")
        os.rename(temporary, target)
    except (OSError, safetensors.SafetensorError) as error:
        raise cannot_write(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_model(bundle: Bundle, folder: Path) -> None:
    """Write weights, configuration and tokenizer by transformers, without `VESTIGES` of other compressions."""
    with silencing(), no_loading_bar():
        bundle.model.save_pretrained(  # type: ignore[operator]
            folder, max_shard_size=SHARD, save_original_format=not fused(bundle)
        )
        bundle.tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in config.items() if name not in VESTIGES}
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def fused(bundle: Bundle) -> bool:
    """True if some layers are fused experts of one parameter, `path[3]`, which older formats store separately."""
    return any(name.endswith("]") for name in bundle.layers)


def provenance(row: Row, folder: Path) -> dict[str, Any]:
    """Metadata of the mask file: the row that the masks belong to, and the checksums of the weight files."""
    names = ("label", "method", "options", "pattern", "seed", "model", "job_digest", "measured_digest")
    return {
        **{name: value for name, value in row.record.items() if name in names},
        "model_digest": row.manifest["model_digest"],
        "model_provenance": row.manifest["model_provenance"],
        "masks_digest": row.proof["masks_digest"],
        "environment": row.record["environment"],
        "sha256": {file.name: file_digest(file) for file in sorted(folder.glob("*.safetensors"))},
    }


def read_back(folder: Path, bundle: Bundle, pruned: PrunedModel) -> Validation:
    """Validate the folder like any other checkpoint, and compare its weights with the live model, bit by bit.

    Raises `NMBenchError` if the folder is not strictly N:M, or a weight differs from the model's.
    """
    artifact = open_artifact(str(folder))
    found = validate(artifact)
    if not found.strict or found.basis != BOTH or len(found.layers) != len(pruned.masks):
        problem = found.first_problem.problem if found.first_problem else "layers are missing"
        raise NMBenchError(f"the folder as written is not the pruned model ({problem}); it was removed.")
    check_written(folder, bundle.model)
    return found


def check_written(folder: Path, model: nn.Module) -> None:
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


def write_about(row: Row, folder: Path, about: dict[str, Any], found: Validation) -> None:
    """Write the record, the specification of this row alone, and the model card."""
    own = folder / MASKS.parent
    sums = {**about["sha256"], str(MASKS): file_digest(folder / MASKS)}
    record = {"record": row.record, "dense": row.dense, "manifest": dict(row.manifest), "sha256": sums}
    (own / "record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (own / "spec.toml").write_text(tomli_w.dumps(row.spec.to_dict()), encoding="utf-8")
    card = model_card(row, found, sums, about.get("rounded", ""))
    (folder / "README.md").write_text(card, encoding="utf-8")
