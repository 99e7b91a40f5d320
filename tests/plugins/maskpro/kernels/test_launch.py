"""Laws of the launcher: where it has programs, and that it needs no Triton to say so."""

from nmbench.runtime import triton_available
from nmbench_plugins.maskpro.kernels import launch
from reference.processes import WITHOUT_TRITON


def test_fused_patterns():
    """Only on an NVIDIA GPU, only the patterns there are programs for."""
    assert not launch.usable(2, 4, "cpu")
    if triton_available("cuda"):
        assert launch.usable(2, 4, "cuda") and not launch.usable(3, 4, "cuda")


def test_launchers_need_no_triton(python):
    """Where Triton is missing, the launchers are importable and say that they are not available."""
    code = WITHOUT_TRITON + "from nmbench_plugins.maskpro.kernels import launch, reference"
    code += "; from nmbench.runtime import triton_available; print(triton_available('cpu'), launch.usable(2, 4, 'cpu'))"
    done = python.run("-c", code)
    assert done.stdout.split() == ["False", "False"], done.stderr
