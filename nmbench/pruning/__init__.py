"""From a method to masks and weights: scored, solved, refined, learnt, imported or repaired."""

from nmbench.models.substitution import Provider
from nmbench.pruning.adam import BETAS, adam_step, pace_of
from nmbench.pruning.block_errors import in_passes, relative_error, squared_errors
from nmbench.pruning.block_parts import BlockTask, Part
from nmbench.pruning.budget import Budget, Budgeted, rise_and_fall
from nmbench.pruning.learning import Batch, LearnTask
from nmbench.pruning.least_squares import better_rows, conjugate_gradients
from nmbench.pruning.live_weights import LiveWeights, masked
from nmbench.pruning.mask_run import MaskRun, MaskUpdates, RunOptions
from nmbench.pruning.mask_steps import MaskSteps, StepSettings
from nmbench.pruning.noise import gumbel, salt_of, step_keys
from nmbench.pruning.part_replay import PartReplay
from nmbench.pruning.prior import lead_for
from nmbench.pruning.replay import Replay
from nmbench.pruning.selection import Selection
from nmbench.pruning.static_call import StaticCall
from nmbench.pruning.training import Training
from nmbench.pruning.weights_task import WeightTask

__all__ = [
    "BETAS",
    "Batch",
    "BlockTask",
    "Budget",
    "Budgeted",
    "LearnTask",
    "LiveWeights",
    "MaskRun",
    "MaskSteps",
    "MaskUpdates",
    "Part",
    "PartReplay",
    "Provider",
    "Replay",
    "RunOptions",
    "Selection",
    "StaticCall",
    "StepSettings",
    "Training",
    "WeightTask",
    "adam_step",
    "better_rows",
    "conjugate_gradients",
    "gumbel",
    "in_passes",
    "lead_for",
    "masked",
    "pace_of",
    "relative_error",
    "rise_and_fall",
    "salt_of",
    "squared_errors",
    "step_keys",
]
