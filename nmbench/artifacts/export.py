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

from nmbench.artifacts.exact import fill_zeros, kept_zeros, sentence
from nmbench.artifacts.folder import MASKS
from nmbench.artifacts.kept_masks import file_digest
from nmbench.artifacts.model_card import model_card
from nmbench.artifacts.model_files import VESTIGES as VESTIGES
from nmbench.artifacts.packed_folder import packed_bytes
from nmbench.artifacts.reading import open_artifact
from nmbench.artifacts.rebuilding import Row, make_again
from nmbench.artifacts.targets import PLAIN, Target, target_named
from nmbench.artifacts.validation import BOTH, Validation, validate
from nmbench.errors import NMBenchError
from nmbench.experiment.loading import dtype_of
from nmbench.methods import PrunedModel
from nmbench.models.bundle import Bundle
from nmbench.models.casting import cast_parameters
from nmbench.models.rounding import store_floats
from nmbench.pattern import Pattern, all_finite
from nmbench.plugins.loading import Plugins
from nmbench.results.files import cannot_write, save_masks
from nmbench.results.ranking import file_name
from nmbench.runtime import dtype_name


@dataclass(frozen=True)
class Written:
    """An export: what reading it back proved; sentences on weights that were rounded, and on kept zeros that were
    filled, empty without any; the bytes of the packed layers and of the dense ones, None unless packed.
    """

    validation: Validation
    rounded: str = ""
    exact: str = ""
    packed_bytes: tuple[int, int] | None = None


Check = Callable[[Path, Bundle, PrunedModel], Validation]  # folder, live model, masks


def export(
    row: Row,
    target: Path,
    plugins: Plugins,
    device: str | None = None,
    check: Check | None = None,
    dtype: str | None = None,
    engine: str = PLAIN,
    exact: bool = False,
) -> Written:
    """Write the model of a finished row to the new folder `target`; return what reading `target` back proved.

    `dtype` is the dtype of the weights in the folder, by default that of the checkpoint that was pruned; weights of a
    run with `--weights int8` are written as the numbers that they stand for. `engine` is
    the name of a target (`targets.NAMES`). `exact` fills groups with fewer than N non-zeros, unless the target stores
    kept zeros. `check` stands in for `read_back`, so that tests can make the check fail.

    Raises `NMBenchError` if `target` exists, the engine cannot run the model, or a weight is too large for `dtype`,
    `ModelChanged` or `NotReproduced` if the row cannot be made again bit by bit, `CannotWrite` if the disk refuses.
    """
    if target.exists():
        raise NMBenchError(f"{target} exists; give another folder with --to, or remove it.")
    form = target_named(engine)
    form.refuse_patterns(stored_patterns(row))
    asked = dtype_of(dtype) if dtype else None
    bundle, pruned = make_again(row, plugins, device)
    store_floats(bundle)
    rounded = cast(bundle, asked or dtype_of(bundle.provenance.get("stored_dtype") or dtype_name(bundle.dtype)))
    form.refuse_model(bundle)
    filled = made_exact(bundle, pruned, form) if exact else ""
    patterns = row.spec.layer_patterns(row.spec.patterns[0], pruned.masks)
    with creating(target) as folder:
        form.write(bundle, pruned, patterns, folder)
        said = {"rounded": rounded, "exact": filled, "for": form.name if form.name != PLAIN else ""}
        about = {**provenance(row, folder), **{name: text for name, text in said.items() if text}}
        save_masks(folder / MASKS, pruned.masks, patterns, about)
        found = (check or form_check(form))(folder, bundle, pruned)
        write_about(row, folder, about, found, form)
        sizes = packed_bytes(folder)
    return Written(found, rounded, filled, sizes)


def stored_patterns(row: Row) -> dict[str, Pattern]:
    """The pattern of every layer, from the header of the row's mask file."""
    masks = open_artifact(str(row.directory / "masks" / f"{file_name(row.record)}.safetensors"))
    return dict(masks.patterns)


def made_exact(bundle: Bundle, pruned: PrunedModel, form: Target) -> str:
    """Fill kept zeros in the live model if the target does not store them; return a sentence on it."""
    count = kept_zeros(bundle, pruned) if form.fills else fill_zeros(bundle, pruned)
    return sentence(count, bundle.dtype, form.fills)


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
        if not all_finite(parameter):
            raise NMBenchError(
                f"{name} holds weights too large for {dtype_name(dtype)}; export with --dtype {dtype_name(source)}."
            )
        changed += int((parameter.to(before[name].dtype) != before[name]).sum())
    if not changed:
        return ""
    return f"{changed} weights were rounded to {dtype_name(dtype)}; they were measured as {dtype_name(source)}."


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


def form_check(form: Target) -> Check:
    """The check of a folder that was written for a target."""

    def check(folder: Path, bundle: Bundle, pruned: PrunedModel) -> Validation:
        return read_back(folder, bundle, pruned, form)

    return check


def read_back(folder: Path, bundle: Bundle, pruned: PrunedModel, form: Target | None = None) -> Validation:
    """Validate the folder like any other checkpoint, and compare its weights with the live model, bit by bit.

    Raises `NMBenchError` if the folder is not strictly N:M, or a weight differs from the model's.
    """
    artifact = open_artifact(str(folder))
    found = validate(artifact)
    if not found.strict or found.basis != BOTH or len(found.layers) != len(pruned.masks):
        problem = found.first_problem.problem if found.first_problem else "layers are missing"
        raise NMBenchError(f"the folder as written is not the pruned model ({problem}); it was removed.")
    (form or target_named(PLAIN)).check(folder, bundle.model)
    return found


def write_about(row: Row, folder: Path, about: dict[str, Any], found: Validation, form: Target) -> None:
    """Write the record, the specification of this row alone, and the model card."""
    own = folder / MASKS.parent
    sums = {**about["sha256"], str(MASKS): file_digest(folder / MASKS)}
    record = {"record": row.record, "dense": row.dense, "manifest": dict(row.manifest), "sha256": sums}
    (own / "record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (own / "spec.toml").write_text(tomli_w.dumps(row.spec.to_dict()), encoding="utf-8")
    notes = [about[name] for name in ("rounded", "exact") if name in about]
    card = model_card(row, found, sums, notes, form.use)
    (folder / "README.md").write_text(card, encoding="utf-8")
