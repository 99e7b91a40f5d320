"""From a method to masks and weights: scored, solved, refined, learnt or imported."""

from nmbench.pruning.learning import Batch, LearnTask
from nmbench.pruning.least_squares import better_rows, conjugate_gradients
from nmbench.pruning.live_weights import LiveWeights, Provider, masked
from nmbench.pruning.selection import Selection

__all__ = [
    "Batch",
    "LearnTask",
    "LiveWeights",
    "Provider",
    "Selection",
    "better_rows",
    "conjugate_gradients",
    "masked",
]
