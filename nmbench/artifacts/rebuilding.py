"""The pruned model of a finished row, made again from its run directory and proven to be the one that was measured.

A run directory holds masks, and the weights of repairs. Weights that a solver repaired are not kept: its job runs again
on the same tokens. In either case the pruned model must have the hash that its record holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmbench.artifacts.folder import read_json
from nmbench.errors import ModelChanged, NMBenchError, NotReproduced, unknown
from nmbench.experiment.contenders import BESIDE
from nmbench.experiment.loading import dtype_of, load_dense
from nmbench.experiment.plan import checked
from nmbench.experiment.self_text import sample_text
from nmbench.experiment.setup import prepared
from nmbench.methods import Pruned, PrunedModel
from nmbench.models.applying import apply
from nmbench.models.bundle import Bundle
from nmbench.pattern import Pattern
from nmbench.plain_data import read_toml
from nmbench.plugins.loading import Plugins
from nmbench.pruning.dispatch import made
from nmbench.pruning.starts import kept
from nmbench.results.directory import RunDirectory
from nmbench.results.files import load_masks
from nmbench.results.format import Record
from nmbench.results.ranking import file_name
from nmbench.results.results import load_results
from nmbench.spec import DENSE, RunSpec
from nmbench.verification.strict import Proof, masks_digest

REASON = "the machine, the device or a version may differ from the environment in its record"


@dataclass(frozen=True)
class Row:
    """A finished row: its record, the record of the dense model, and the specification of this row alone."""

    directory: Path
    record: Record
    dense: Record
    spec: RunSpec
    manifest: Mapping[str, Any]

    @property
    def proof(self) -> Proof:
        """The proof of strictness of the row."""
        assert self.record["proof"]
        return self.record["proof"]

    @property
    def title(self) -> str:
        return f"{self.record['label']} {self.record['pattern']} seed {self.record['seed']}"


def find_row(directory: Path, label: str, pattern: Pattern | None = None, seed: int | None = None) -> Row:
    """The one finished row of a run directory that the arguments name.

    Raises `NMBenchError` if no row or several match, or the row failed.
    """
    records = load_results(directory).records
    labels = [record["label"] for record in records if record["label"] != DENSE]
    if label not in labels:
        raise unknown("row", label, labels, f" in {directory}")
    found = [r for r in records if r["label"] == label and (pattern is None or r["pattern"] == str(pattern))]
    found = [record for record in found if seed is None or record["seed"] == seed]
    if len(found) != 1:
        listed = ", ".join(f"{r['pattern']} seed {r['seed']}" for r in records if r["label"] == label)
        problem = "several rows" if found else "no such row"
        raise NMBenchError(f"{directory} has {problem} for {label}; choose by --pattern and --seed from {listed}.")
    if found[0]["status"] != "ok":
        raise NMBenchError(f"{label} failed in {directory}: {found[0]['error']}")
    dense = next((record for record in records if record["label"] == DENSE), None)
    if dense is None:
        raise NMBenchError(f"{directory} has no row of the dense model; give its command again to complete it.")
    return Row(directory, found[0], dense, spec_of(directory, found[0]), read_json(directory / "manifest.json"))


def spec_of(directory: Path, record: Record) -> RunSpec:
    """The specification of the run, reduced to the methods, the pattern and the seed that one row needs."""
    spec = RunSpec.from_dict(read_toml(directory / "spec.toml"), str(directory / "spec.toml"))
    methods = {method.label: method for method in spec.methods}
    needed: list[str] = []
    waiting = [record["label"].partition("@")[0]]  # a start, or a repair of several rows, belongs to its method
    if waiting[0] not in methods:  # a start under the name of its method belongs to every repair
        waiting = list(methods)
    while waiting:  # a method may start from another one, which may start from a third
        label = waiting.pop()
        if label in methods and label not in needed:
            needed.append(label)
            waiting += [part.strip() for part in str(methods[label].options.get("init", "")).split(BESIDE)]
    return dataclasses.replace(
        spec,
        methods=tuple(method for method in spec.methods if method.label in needed),
        patterns=(Pattern.parse(str(record["pattern"])),),
        seeds=(record["seed"] or 0,),
    )


def make_again(row: Row, plugins: Plugins, device: str | None = None) -> tuple[Bundle, PrunedModel]:
    """Load the dense model and prune it as the row was; return the bundle, which holds the pruned weights, and masks.

    Raises `ModelChanged` if the dense model is not that of the run, `NotReproduced` if the masks or the pruned weights
    are not.
    """
    spec = row.spec if device is None else dataclasses.replace(row.spec, device=device)
    bundle = load_dense(spec, plugins).leaving(row.manifest["skipped"])
    if bundle.digest() != row.manifest["model_digest"]:
        raise ModelChanged(f"model {spec.model} does not hold the weights that {row.directory} was made with.")
    pruned = stored(row, bundle)
    if row.record["weights_changed"]:
        pruned = with_weights(row, pruned) or repeated(row, spec, bundle, plugins)
    if masks_digest(pruned.masks) != row.proof["masks_digest"]:
        raise NotReproduced(f"the masks of {row.title} are not those that were measured: {REASON}.")
    apply(bundle, pruned)
    measured = bundle.in_dtype(dtype_of(spec.resolved(bundle.defaults).eval_dtype))
    if row.record.get("measured_digest") != measured.digest():
        raise NotReproduced(f"the weights of {row.title} are not those that were measured: {REASON}.")
    return bundle, pruned


def stored(row: Row, bundle: Bundle) -> PrunedModel:
    """The dense weights under the masks of the run directory.

    Raises `NotReproduced` if the masks are of other layers than the model's.
    """
    masks = load_masks(row.directory / "masks" / f"{file_name(row.record)}.safetensors")
    refuse_other_layers(list(masks), list(bundle.layers), row)
    return PrunedModel({name: Pruned(mask.to(bundle.device)) for name, mask in masks.items()})


def with_weights(row: Row, pruned: PrunedModel) -> PrunedModel | None:
    """The pruned model with the weights that the run directory keeps; None if it keeps none."""
    directory, name = RunDirectory(row.directory), file_name(row.record)
    return kept(directory, name, pruned.masks, row.record["job_digest"])


def refuse_other_layers(masks: Sequence[str], layers: Sequence[str], row: Row) -> None:
    if set(masks) != set(layers):
        raise NotReproduced(f"the masks of {row.title} are of other layers than those of model {row.spec.model}.")


def repeated(row: Row, spec: RunSpec, bundle: Bundle, plugins: Plugins) -> PrunedModel:
    """The pruned model of a row with repaired weights: its job is run again.

    Raises `NotReproduced` if the calibration tokens, a file or an option is no longer the row's.
    """
    directory = RunDirectory(row.directory)
    experiment = prepared(checked(spec, plugins), bundle)
    sample_text(experiment, directory)
    same = [job for job in experiment.jobs() if job.digest == row.record["job_digest"]]
    if not same or experiment.calibration_digest(same[0].seed) != row.record["calibration_digest"]:
        raise NotReproduced(
            f"{row.title} cannot be repeated: its texts, a file or a default of its method has changed since "
            f"{row.directory} was made."
        )
    pruned = made(same[0], experiment, directory).pruned
    directory.drop_checkpoint(same[0].name, row.record)
    return pruned
