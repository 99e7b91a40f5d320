"""Laws of perplexity: exp of the mean loss, and a clear error where no number holds it."""

import math

import pytest
import torch

from nmbench.errors import NumericalFailure
from nmbench_plugins.perplexity import Perplexity


class Told:
    """A subject with given losses."""

    def __init__(self, *losses: float) -> None:
        self.found = torch.tensor(losses, dtype=torch.float64)

    def losses(self, dataset: str, window: int, bos: bool = False) -> torch.Tensor:
        return self.found


def test_the_largest_losses():
    """A loss of 709 nats has a perplexity; one of 800 is an error that names text and loss."""
    metric = Perplexity("demo@64")
    assert metric.measure(Told(709.0), None)["ppl:demo@64"].value == math.exp(709)
    with pytest.raises(NumericalFailure, match=r"the mean loss on demo@64 is 800\.0 nats per token"):
        metric.measure(Told(700.0, 900.0), None)
