"""What a pruning method is: one that makes a mask (`masks`), or one that repairs weights under a mask (`repairs`).

Plugins import these names from `nmbench`.
"""

from nmbench.methods.masks import Baseline as Baseline
from nmbench.methods.masks import DenseModel as DenseModel
from nmbench.methods.masks import LayerStats as LayerStats
from nmbench.methods.masks import Layerwise as Layerwise
from nmbench.methods.masks import MaskLearner as MaskLearner
from nmbench.methods.masks import MaskSource as MaskSource
from nmbench.methods.masks import Method as Method
from nmbench.methods.masks import Pruned as Pruned
from nmbench.methods.masks import PrunedModel as PrunedModel
from nmbench.methods.masks import Refiner as Refiner
from nmbench.methods.masks import Scorer as Scorer
from nmbench.methods.masks import Solver as Solver
from nmbench.methods.masks import Stat as Stat
from nmbench.methods.repairs import SCOPES as SCOPES
from nmbench.methods.repairs import BlockRepair as BlockRepair
from nmbench.methods.repairs import LayerRepair as LayerRepair
from nmbench.methods.repairs import Repair as Repair
from nmbench.methods.repairs import WeightLearner as WeightLearner
