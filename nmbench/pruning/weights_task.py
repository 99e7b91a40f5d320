"""The task of a weight learner: a `LearnTask` whose masks are fixed and whose kept weights are trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from nmbench.methods import PrunedModel
from nmbench.models.applying import applied, apply, moved
from nmbench.models.bundle import Bundle
from nmbench.pruning.learning import LearnTask
from nmbench.pruning.training import Training


class WeightTask(LearnTask):
    """The task of one weight learner. Besides what a `LearnTask` holds:

    `start`: mask and weights of the row that is repaired. `weights`: name -> its weight `[out, in]`, in the dtype of
    the model, in host memory and zero off the mask; read-only.
    """

    def __init__(self, bundle: Bundle, *args: Any, start: PrunedModel, **kwargs: Any) -> None:
        super().__init__(bundle, *args, **kwargs)
        self.start = start
        cpu = torch.device("cpu")
        self.weights = {name: applied(moved(start.layers[name], cpu), dense) for name, dense in self.dense.items()}

    @contextlib.contextmanager
    def training(self) -> Iterator[Training]:
        """Open the live weights, which are those of the start and have gradients; dense weights come back at the end.

        Only prunable weights have gradients.
        """
        try:
            apply(self.bundle, self.start)
            yield Training(self, self._weights)
        finally:
            self.bundle.model.zero_grad()  # gradients are as large as the model
            self._weights.restore()
