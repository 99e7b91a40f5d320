"""The comparison of a repair with its start on selection windows that the repair has not seen."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch
from torch import Tensor

from nmbench.comparison import not_worse
from nmbench.evaluation.losses import batch_size, window_losses
from nmbench.experiment.measurement import in_parts
from nmbench.experiment.setup import Experiment
from nmbench.methods import PrunedModel
from nmbench.models.applying import apply
from nmbench.pruning.selection import halves
from nmbench.runtime.cost import Cost

CONFIRMATION = "confirmation"  # the note in the record


def unseen(selection: Tensor, who: str) -> Tensor:
    """Return the second half of the selection windows, which no learner chooses by.

    Raises `NMBenchError` as `halves`.
    """
    return halves(selection, who)[1]


def confirmed(
    experiment: Experiment, start: PrunedModel, repaired: PrunedModel, windows: Tensor, cost: Cost, title: str
) -> PrunedModel:
    """Return the repaired model if it is not worse than `start` on unseen windows, else the start; a note says which.

    The tokens of `windows` `[n, window_tokens]` are added to `cost`. The dense weights are put back.
    """
    before, after = (losses_of(experiment, pruned, windows, title) for pruned in (start, repaired))
    cost.forward_tokens += 2 * windows.numel()
    cost.selection_tokens = max(cost.selection_tokens, windows.numel())  # distinct: a learner may have read all
    found = not_worse(after, before, 0.0)
    note = {**asdict(found), "holds": found.holds}
    chosen = repaired if found.holds else replace(repaired, layers=start.layers, others=start.others)
    return replace(chosen, notes={**repaired.notes, CONFIRMATION: note})


@torch.no_grad()
def losses_of(experiment: Experiment, pruned: PrunedModel, windows: Tensor, title: str) -> Tensor:
    """Return the losses float32 `[n]` of a pruned model on windows `[n, window_tokens]`, in the dtype of pruning."""
    bundle = experiment.bundle
    try:
        apply(bundle, pruned)
        return in_parts(bundle)(
            lambda part: window_losses(bundle.model, part),
            windows.to(bundle.device),
            batch_size(bundle.model, windows.shape[1]),
            experiment.reporter(title, "confirm"),
        ).cpu()
    finally:
        experiment.dense.put_back()
