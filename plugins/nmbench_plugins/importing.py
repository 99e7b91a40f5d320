"""Rows from published masks and sparse checkpoints, in any format that `nmbench validate` reads.

A mask is used unchanged. A sparse checkpoint without masks gives only the nonzero weights, at most N in every group. So
does a mask file that was made from such a checkpoint, as the `mask.npz` of PATCH was. A group with fewer than N nonzero
weights is filled up: the zero with the smallest dense weight counts as kept, and the lower index among equals. If the
checkpoint is a mask on the dense weights of this model, the filled weights are zero in the dense model as well, so that
the row computes the same outputs as the checkpoint. The record notes the number of filled weights that are not zero in
the dense model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import nmbench

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Import(nmbench.MaskSource):
    """Take the masks of a file, as MaskLLM, MaskPro or nmbench write them, or the zeros of a sparse checkpoint."""

    path: str = nmbench.option("", "a file or folder that `nmbench validate` reads, or RUN_DIRECTORY:LABEL")
    weights: bool = nmbench.option(
        False,
        "take the weights of the checkpoint's linear layers, not the dense weights (other weights are never taken)",
    )

    def content(self) -> Mapping[str, str]:
        if not self.path:
            raise nmbench.NMBenchError("method import needs a file: give --set LABEL.path=PATH.")
        return {"files_digest": nmbench.files_digest(self.path)}

    def bring(self, model: nmbench.DenseModel) -> nmbench.PrunedModel:
        kept = nmbench.open_masks(self.path).named(model.parameter_of)
        refuse_others(kept, model)
        if self.weights and not kept.weights:
            raise nmbench.NMBenchError(f"{kept.path} holds masks; a checkpoint has weights to take.")
        total: dict[str, int] = {}
        layers = {}
        for name, dense in model.weights.items():
            mask, counts = mask_of(kept, name, dense, model.patterns[name])
            layers[name] = nmbench.Pruned(mask, self.weight(kept, name, mask, dense))
            total = {key: total.get(key, 0) + value for key, value in counts.items()}
        made_for = {"base_model": kept.base_model} if kept.base_model else {}
        notes = {"imported": {"form": kept.form, **made_for, **self.content(), **total}}
        return nmbench.PrunedModel(layers, notes, origin=nmbench.row_record(self.path))

    def weight(self, kept: nmbench.Kept, name: str, mask: Tensor, dense: Tensor) -> Tensor | None:
        """Return the weight of the checkpoint, if the option `weights` is set, else None."""
        if not self.weights:
            return None
        return kept.weight_of(name).to(dense.dtype).masked_fill(~mask, 0.0)


def refuse_others(kept: nmbench.Kept, model: nmbench.DenseModel) -> None:
    """Raise `NMBenchError` if the file has masks for layers that the model lacks: the masks are of another model."""
    known = {*model.weights, *model.skipped, *(name.removesuffix(".weight") for name in model.skipped)}
    if others := kept.others(known):
        raise nmbench.NMBenchError(
            f"{kept.path} has masks for {len(others)} layers that the model lacks; first: {others[0]}. The file is of "
            f"another model."
        )


def mask_of(kept: nmbench.Kept, name: str, dense: Tensor, pattern: nmbench.Pattern) -> tuple[Tensor, dict[str, int]]:
    """Return the bool mask `[out, in]` of one layer, and counts of unlike and filled weights.

    The host checks the groups of the mask.
    """
    import torch

    mask = kept.of_layer(name, (dense.shape[0], dense.shape[1])).whole()
    counts = {}
    if kept.weights:
        unlike = (kept.weight_of(name).to(dense.dtype) != dense) & mask
        counts["kept_weights_unlike_dense"] = int(unlike.sum())
    if not kept.at_most:
        return mask, counts
    whole = pattern.touched(mask)  # [out, in]; a unit of which one weight is kept is kept
    refuse_more(kept, name, pattern.kept(whole), pattern)
    filled = pattern.top(torch.where(whole, 1.0, -dense.float().abs()))  # [out, in]
    counts["groups_filled"] = int((pattern.kept(mask) < pattern.keep).sum())
    counts["filled_with_nonzero_dense_weights"] = int(((dense != 0) & filled & ~mask).sum())
    return filled, counts


def refuse_more(kept: nmbench.Kept, name: str, counts: Tensor, pattern: nmbench.Pattern) -> None:
    """Raise `NotStrict` if a group has more than `pattern.keep` non-zeros, zeros of their units among them.

    `counts`: `[out, in / group]`, the counts of such weights.
    """
    if len(more := (counts > pattern.keep).nonzero()):
        row, group = more[0].tolist()
        columns = f"{group * pattern.group}..{(group + 1) * pattern.group - 1}"
        raise nmbench.NotStrict(
            f"{kept.path} is not {pattern} in {name}: {len(more)} of {counts.numel()} groups; first: row {row}, "
            f"columns {columns} have {have(int(counts[row, group]), pattern)}."
        )


def have(count: int, pattern: nmbench.Pattern) -> str:
    """Return the words for a group with `count` weights instead of at most `pattern.keep`."""
    if pattern.unit == 1:
        return f"{count} non-zeros instead of at most {pattern.keep}"
    return f"non-zeros in {count // pattern.unit} units of {pattern.unit} instead of at most {pattern.units.keep}"


@nmbench.hookimpl
def nmbench_register_baselines(register: nmbench.Register) -> None:
    register("import", Import)
