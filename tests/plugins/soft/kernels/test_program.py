"""The Triton programs of soft against plain torch: interpreted, and on a GPU if there is one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nmbench as nm
from nmbench.pruning import gumbel, pace_of, step_keys
from nmbench.runtime import triton_available
from nmbench_plugins.soft.kernels import launch
from nmbench_plugins.soft.logits import EPSILON
from nmbench_plugins.soft.relaxation import as_rows, columns, soft_mask, soft_mask_gradient
from reference import triton_language

MODULE = "nmbench_plugins.soft.kernels.program"
PATTERNS = [nm.Pattern.parse(text) for text in ("1:2", "1:4", "2:4", "3:4", "2:3", "4:8")]
few = settings(max_examples=5, deadline=None)
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")
shapes = st.tuples(st.integers(1, 6), st.integers(1, 40))  # rows, groups in a row
settings_of_a_step = st.tuples(st.sampled_from([1.0, 0.2, 0.05]), st.sampled_from([0.02, 0.002]))


@pytest.fixture(scope="module")
def interpreted():
    with triton_language.interpreted(MODULE) as module:
        yield module


def layer(pattern, shape, dtype, seed, device):
    """Logits, moments, a dense weight and a gradient of one layer."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape[0], shape[1] * pattern.group)
    logits = 0.05 * torch.randint(0, 2, size, generator=generator) + 0.01 * torch.randn(size, generator=generator)
    first, dense, gradient = (torch.randn(size, generator=generator) for _ in range(3))
    tensors = logits, 1e-2 * first, 1e-2 * first.square(), dense.to(dtype), gradient.to(dtype)
    return tuple(tensor.to(device) for tensor in tensors)


def agree(pattern, shape, dtype, seed, setting, programs):
    """Both programs and plain torch agree to rounding, with moments of the dtype of the weights."""
    device = "cpu" if programs else "cuda"
    logits, first, second, dense, gradient = layer(pattern, shape, dtype, seed, device)
    first, second = first.to(dtype), second.to(dtype)
    keys = torch.tensor(step_keys(seed, 3), dtype=torch.int32, device=device)
    scales = torch.tensor(setting, device=device)
    drawn = columns(gumbel(keys, 2, 0, logits.shape) + logits / scales[1], pattern.group)
    mask = as_rows(soft_mask(drawn, scales[0], pattern.keep), logits.shape)
    out = torch.empty_like(dense)
    launch.write(logits, dense, out, pattern, keys, scales, 2, programs)
    close = {"rtol": 2e-2, "atol": 1e-2} if dtype != torch.float32 else {"rtol": 1e-3, "atol": 2e-3}
    torch.testing.assert_close(out.float(), dense.float() * mask, **close)

    slope = columns(gradient.float() * dense.float(), pattern.group)
    wanted = as_rows(soft_mask_gradient(drawn, scales[0], pattern.keep, slope), logits.shape) / scales[1]
    pace = torch.tensor(pace_of(1e-3, 3), device=device)
    expected = first.float().lerp(wanted, pace[0]), second.float().lerp(wanted.square(), pace[1])
    moved = logits - expected[0] * pace[2] / ((expected[1] * pace[3]).sqrt() + EPSILON)
    launch.learn(logits, first, second, dense, gradient, pattern, keys, scales, pace, EPSILON, 2, programs)
    scale = float(wanted.abs().max()) + 1
    torch.testing.assert_close(first.float(), expected[0], rtol=1e-2, atol=1e-3 * scale)
    torch.testing.assert_close(second.float(), expected[1], rtol=2e-2, atol=1e-3 * scale**2)
    torch.testing.assert_close(logits, moved, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@few
@given(shapes, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31), settings_of_a_step)
def test_programs_agree_with_torch(interpreted, pattern, shape, dtype, seed, setting):
    """Noise, soft mask, masked weight, gradient and step of the programs are those of plain torch."""
    agree(pattern, shape, dtype, seed, setting, interpreted)


@pytest.mark.skipif(not triton_available("cuda"), reason="needs an NVIDIA GPU and Triton")
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@few
@given(shapes, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31), settings_of_a_step)
def test_compiled_programs_agree_with_torch(pattern, shape, dtype, seed, setting):
    """The same on a GPU."""
    agree(pattern, shape, dtype, seed, setting, None)
