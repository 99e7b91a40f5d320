"""From a method to masks and weights: scored, solved, refined, learnt, imported or repaired."""

from nmbench.pruning.block_errors import in_passes, relative_error, squared_errors
from nmbench.pruning.block_parts import BlockTask, Part
from nmbench.pruning.budget import rise_and_fall, steps_within
from nmbench.pruning.learning import Batch, LearnTask
from nmbench.pruning.least_squares import better_rows, conjugate_gradients
from nmbench.pruning.live_weights import LiveWeights, Provider, masked
from nmbench.pruning.part_replay import PartReplay
from nmbench.pruning.replay import Replay
from nmbench.pruning.selection import Selection
from nmbench.pruning.static_call import StaticCall
from nmbench.pruning.training import Training
from nmbench.pruning.weights_task import WeightTask

__all__ = [
    "Batch",
    "BlockTask",
    "LearnTask",
    "LiveWeights",
    "Part",
    "PartReplay",
    "Provider",
    "Replay",
    "Selection",
    "StaticCall",
    "Training",
    "WeightTask",
    "better_rows",
    "conjugate_gradients",
    "in_passes",
    "masked",
    "relative_error",
    "rise_and_fall",
    "squared_errors",
    "steps_within",
]
