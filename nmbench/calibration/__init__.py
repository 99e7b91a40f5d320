"""Statistics of layer inputs, gathered block by block."""

from nmbench.calibration.gram import full_float32, tf32
from nmbench.calibration.resuming import resumable, resumed, until
from nmbench.calibration.step import FewTokens, Step
from nmbench.calibration.walk import walk

__all__ = ["FewTokens", "Step", "full_float32", "resumable", "resumed", "tf32", "until", "walk"]
