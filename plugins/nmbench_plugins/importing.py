"""Published masks and sparse checkpoints as rows: any format that `nmbench validate` reads.

A mask is taken as it is. A sparse checkpoint without masks says only what is not zero: at most N in every group. Where
a group has fewer, a kept weight was zero, and one of the zeros is made a kept one: that with the smallest dense weight,
lower index first. If the checkpoint is a mask on the dense weights of this model, those are the weights that are zero
in it already, so that the row computes what the checkpoint does; how often they are not is noted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import nmbench


@dataclass(frozen=True)
class Import(nmbench.MaskSource):
    """Take the masks of a file, as MaskLLM, MaskPro or nmbench write them, or the zeros of a sparse checkpoint."""

    path: str = nmbench.option("", "a file or folder that `nmbench validate` reads, or RUN_DIRECTORY:LABEL")
    weights: bool = nmbench.option(
        False,
        "take the weights of the checkpoint's linear layers as well, not the dense ones (and nothing else of it)",
    )

    def content(self) -> Mapping[str, str]:
        if not self.path:
            raise nmbench.NMBenchError("method import needs a file: give --set LABEL.path=PATH.")
        return {"files_digest": nmbench.files_digest(self.path)}

    def bring(self, model: nmbench.DenseModel) -> nmbench.PrunedModel:
        kept = nmbench.open_masks(self.path)
        refuse_others(kept, model)
        if self.weights and not kept.weights:
            raise nmbench.NMBenchError(f"{kept.path} holds masks; a checkpoint has weights to take.")
        total: dict[str, int] = {}
        layers = {}
        for name, dense in model.weights.items():
            mask, counts = mask_of(kept, name, dense, model.patterns[name])
            layers[name] = nmbench.Pruned(mask, self.weight(kept, name, mask, dense))
            total = {key: total.get(key, 0) + value for key, value in counts.items()}
        return nmbench.PrunedModel(layers, {"imported": {"form": kept.form, **self.content(), **total}})

    def weight(self, kept: nmbench.Kept, name: str, mask: Tensor, dense: Tensor) -> Tensor | None:
        """The weight that the checkpoint has, if it is asked for."""
        if not self.weights:
            return None
        return kept.weight_of(name).to(dense.dtype).masked_fill(~mask, 0.0)


def refuse_others(kept: nmbench.Kept, model: nmbench.DenseModel) -> None:
    """Raise `NMBenchError` if the file has masks for layers that the model does not have: it is of another model."""
    known = {*model.weights, *model.skipped, *(name.removesuffix(".weight") for name in model.skipped)}
    if others := kept.others(known):
        raise nmbench.NMBenchError(
            f"{kept.path} has masks for {len(others)} layers that the model lacks; first: {others[0]}. It is of "
            f"another model."
        )


def mask_of(kept: nmbench.Kept, name: str, dense: Tensor, pattern: nmbench.Pattern) -> tuple[Tensor, dict[str, int]]:
    """The bool mask `[out, in]` of one layer, and what had to be decided to make it. The host checks its groups."""
    mask = kept.of_layer(name, (dense.shape[0], dense.shape[1])).whole()
    counts = {}
    if kept.weights:
        unlike = (kept.weight_of(name).to(dense.dtype) != dense) & mask
        counts["kept_weights_unlike_dense"] = int(unlike.sum())
    if not kept.at_most:
        return mask, counts
    refuse_more(kept, name, pattern.kept(mask), pattern)
    filled = pattern.top(torch.where(mask, 1.0, -dense.float().abs()))  # [out, in]
    counts["groups_filled"] = int((pattern.kept(mask) < pattern.keep).sum())
    counts["filled_with_nonzero_dense_weights"] = int(((dense != 0) & filled & ~mask).sum())
    return filled, counts


def refuse_more(kept: nmbench.Kept, name: str, counts: Tensor, pattern: nmbench.Pattern) -> None:
    """Raise `NotStrict` if a group, of `counts` `[out, in / group]` non-zeros, has more than `pattern.keep`."""
    if len(more := (counts > pattern.keep).nonzero()):
        row, group = more[0].tolist()
        columns = f"{group * pattern.group}..{(group + 1) * pattern.group - 1}"
        raise nmbench.NotStrict(
            f"{kept.path} is not {pattern} in {name}: {len(more)} of {counts.numel()} groups; first: row {row}, "
            f"columns {columns} have {int(counts[row, group])} non-zeros instead of at most {pattern.keep}."
        )


@nmbench.hookimpl
def nmbench_register_baselines(register: nmbench.Register) -> None:
    register("import", Import)
