"""The launcher says where it has programs."""

from nmbench.runtime import triton_available
from nmbench_plugins.maskpro.kernels import launch


def test_fused_patterns():
    """Only on an NVIDIA GPU, only the patterns there are programs for."""
    assert not launch.usable(2, 4, "cpu")
    if triton_available("cuda"):
        assert launch.usable(2, 4, "cuda") and not launch.usable(3, 4, "cuda")
