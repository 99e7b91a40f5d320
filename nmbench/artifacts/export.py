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
from pathlib import Path
from typing import Any

import safetensors
import tomli_w

from nmbench.artifacts.decoder_scope import silencing
from nmbench.artifacts.folder import MASKS
from nmbench.artifacts.kept_masks import file_digest
from nmbench.artifacts.model_card import model_card
from nmbench.artifacts.reading import open_artifact
from nmbench.artifacts.rebuilding import Row, make_again
from nmbench.artifacts.validation import BOTH, Validation, validate
from nmbench.errors import NMBenchError
from nmbench.experiment.loading import no_loading_bar
from nmbench.methods import PrunedModel
from nmbench.models.bit_equality import same_bits
from nmbench.models.bundle import Bundle
from nmbench.plugins.loading import Plugins
from nmbench.results.files import cannot_write, save_masks

VESTIGES = ("sparsity_config", "compression_config", "quantization_config")  # keys on which loaders would act
SHARD = "5GB"

Check = Callable[[Path, Bundle, PrunedModel], Validation]  # folder, live model, masks


def export(
    row: Row, target: Path, plugins: Plugins, device: str | None = None, check: Check | None = None
) -> Validation:
    """Write the model of a finished row to the new folder `target`; return what reading `target` back proved.

    `check` stands in for `read_back`, so that tests can make the check fail.

    Raises `NMBenchError` if `target` exists, `ModelChanged` or `NotReproduced` if the row cannot be made again bit by
    bit, `CannotWrite` if the disk refuses.
    """
    if target.exists():
        raise NMBenchError(f"{target} exists; give another folder with --to, or remove it.")
    bundle, pruned = make_again(row, plugins, device)
    with creating(target) as folder:
        write_model(bundle, folder)
        about = provenance(row, folder)
        patterns = row.spec.layer_patterns(row.spec.patterns[0], pruned.masks)
        save_masks(folder / MASKS, pruned.masks, patterns, about)
        found = (check or read_back)(folder, bundle, pruned)
        write_about(row, folder, about, found)
    return found


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
    live = bundle.model.state_dict()
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                if name in live and not same_bits(opened.get_tensor(name), live[name].cpu()):
                    raise NMBenchError(f"{name} differs from the model after writing; the folder was removed.")
    return found


def write_about(row: Row, folder: Path, about: dict[str, Any], found: Validation) -> None:
    """Write the record, the specification of this row alone, and the model card."""
    own = folder / MASKS.parent
    sums = {**about["sha256"], str(MASKS): file_digest(folder / MASKS)}
    record = {"record": row.record, "dense": row.dense, "manifest": dict(row.manifest), "sha256": sums}
    (own / "record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (own / "spec.toml").write_text(tomli_w.dumps(row.spec.to_dict()), encoding="utf-8")
    (folder / "README.md").write_text(model_card(row, found, sums), encoding="utf-8")
