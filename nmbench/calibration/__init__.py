"""Statistics of layer inputs, gathered block by block."""

from nmbench.calibration.block_calls import resumed, until
from nmbench.calibration.walk import FewTokens, Step, full_float32, walk

__all__ = ["FewTokens", "Step", "full_float32", "resumed", "until", "walk"]
