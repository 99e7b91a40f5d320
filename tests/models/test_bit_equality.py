"""Laws of equality by bits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nmbench.models.bit_equality import same_bits

INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@given(st.data(), st.sampled_from(list(INTEGERS)))
def test_bits_decide(data, dtype):
    """Two numbers are equal if their bits are: all patterns of bits, so signed zeros, NaN and infinities too."""
    bits = np.iinfo(np.int32 if dtype is torch.float32 else np.int16)
    one, two = (data.draw(st.one_of(st.sampled_from((0, bits.min)), st.integers(bits.min, bits.max))) for _ in "ab")
    a, b = (torch.tensor([number], dtype=INTEGERS[dtype]).view(dtype) for number in (one, two))
    assert same_bits(a, b) == (one == two)
    assert same_bits(a, a.clone())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zeros_have_signs(dtype):
    """-0.0 is not 0.0, though the two compare as equal; a NaN is itself, though it compares as unequal."""
    zero, nan = torch.zeros(2, 3, dtype=dtype), torch.full((2, 3), torch.nan, dtype=dtype)
    assert torch.equal(zero, -zero) and not same_bits(zero, -zero)
    assert not torch.equal(nan, nan) and same_bits(nan, nan.clone())


def test_dtype_shape_and_device_count():
    """Equal bytes of another dtype, shape or device are not equal; how a tensor lies in memory does not matter."""
    zero = torch.zeros(2, 3)
    assert not same_bits(zero, zero.int())
    assert not same_bits(zero, zero.t())
    assert not same_bits(zero, zero.to("meta"))
    assert same_bits(zero.to("meta"), zero.to("meta"))
    x = torch.arange(6.0).view(2, 3)
    assert same_bits(x.t(), x.t().contiguous())
    assert same_bits(torch.tensor(1.5), torch.tensor(1.5)) and same_bits(torch.tensor([]), torch.tensor([]))
    assert same_bits(torch.tensor(True), torch.tensor(True))
