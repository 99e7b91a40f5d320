"""From a method to masks and weights: scored, solved, refined, learnt, imported or repaired."""

from nmbench.pruning.adam import BETAS, adam_step, pace_of
from nmbench.pruning.block_parts import SCOPES, BlockTask, Part
from nmbench.pruning.budget import rise_and_fall, steps_within
from nmbench.pruning.learning import Batch, LearnTask
from nmbench.pruning.least_squares import better_rows, conjugate_gradients
from nmbench.pruning.live_weights import LiveWeights, Provider, masked
from nmbench.pruning.mask_run import MaskRun, MaskUpdates, RunOptions
from nmbench.pruning.mask_steps import MaskSteps
from nmbench.pruning.noise import gumbel, salt_of, step_keys
from nmbench.pruning.replay import Replay
from nmbench.pruning.selection import Selection
from nmbench.pruning.static_call import StaticCall
from nmbench.pruning.training import Training
from nmbench.pruning.weights_task import WeightTask

__all__ = [
    "BETAS",
    "SCOPES",
    "Batch",
    "BlockTask",
    "LearnTask",
    "LiveWeights",
    "MaskRun",
    "MaskSteps",
    "MaskUpdates",
    "Part",
    "Provider",
    "Replay",
    "RunOptions",
    "Selection",
    "StaticCall",
    "Training",
    "WeightTask",
    "adam_step",
    "better_rows",
    "conjugate_gradients",
    "gumbel",
    "masked",
    "pace_of",
    "rise_and_fall",
    "salt_of",
    "step_keys",
    "steps_within",
]
