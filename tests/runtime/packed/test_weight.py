"""Packing strict N:M weights is undone by unpacking, bit for bit, and takes the bytes that the format promises."""

from __future__ import annotations

from math import comb, log2

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmbench.errors import NotStrict
from nmbench.pattern import Pattern
from nmbench.runtime import pack, packed_share, unpack
from nmbench.runtime.packed.bits import packed_bits, unpacked_bits
from nmbench.runtime.packed.weight import by_index, group_bits, kept_of
from nmbench.testing import strategies

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int32]
many = settings(max_examples=60, deadline=None)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Pattern]:
    """A weight that is zero off its mask, of any dtype and number of rows; the last group of a row may be short."""
    pattern = draw(strategies.patterns(units=(1, 2)))
    rows, inputs = draw(st.integers(1, 7)), draw(st.integers(1, 4 * pattern.group))
    kind = draw(st.sampled_from(["normal", "zeros", "signed zeros", "ties"]))
    weight = strategies.values(kind, (rows, inputs), draw(st.integers(0, 2**31)))
    padded = F.pad(torch.rand(rows, inputs), (0, -inputs % pattern.group), value=-1.0)
    mask = pattern.top(padded)[:, :inputs]
    dtype = draw(st.sampled_from(DTYPES))
    weight = weight.to(dtype) if dtype.is_floating_point else (100 * weight).clamp(-100, 100).to(dtype)
    kept = torch.where(bits(mask).bool(), weight.float(), 0.0).to(dtype)
    return kept, mask, pattern


@many
@given(problems())
def test_unpacking_gives_the_weight_back(problem):
    """Any pattern, dtype and shape: all bits come back, with the mask and, where no -0.0 is dropped, without it."""
    weight, mask, pattern = problem
    for given_mask in (mask, None):
        packed = pack(weight, pattern, given_mask)
        assert torch.equal(bits(unpack(packed)), bits(weight))
        assert packed.shape == weight.shape and packed.values.dtype == weight.dtype
        kept = kept_of(packed)
        assert not pattern.broken(kept).any()
    assert (kept_of(pack(weight, pattern, mask))[:, : weight.shape[1]] | ~mask).all()


@many
@given(strategies.patterns(), st.integers(1, 5), st.integers(1, 300))
def test_bytes_are_those_of_the_format(pattern, rows, groups):
    """N values and the smaller of N ceil(log2 M) and M bits for each group; rows begin at whole bytes."""
    weight = torch.zeros(rows, groups * pattern.group, dtype=torch.bfloat16)
    packed = pack(weight, pattern)
    code = min(pattern.keep * (pattern.group - 1).bit_length(), pattern.group)
    assert group_bits(pattern) == code >= log2(comb(pattern.group, pattern.keep))
    assert packed.bytes == rows * (2 * groups * pattern.keep + -(-groups * code // 8))
    assert packed.dense_bytes == weight.nbytes
    assert abs(packed.bytes / packed.dense_bytes - packed_share(pattern)) <= 1 / (2 * weight.shape[1])


@pytest.mark.parametrize(
    ("pattern", "share", "indices"),
    [
        ("2:4", 9 / 16, True),
        ("1:4", 9 / 32, True),
        ("4:8", 9 / 16, False),
        ("8:16", 9 / 16, False),
        ("4:6", 35 / 48, False),
        ("6:8", 13 / 16, False),
        ("8:10", 69 / 80, False),
        ("2:4x2", 9 / 16, False),
    ],
)
def test_shares_of_usual_patterns(pattern, share, indices):
    """The shares of the guide, in 16 bits."""
    pattern = Pattern.parse(pattern)
    assert packed_share(pattern) == pytest.approx(share)
    assert by_index(pattern) is indices


def test_the_code_of_2_to_4_is_that_of_the_documentation():
    """Two bits an index, lowest first, the first group of a row in the lowest bits of its byte."""
    packed = pack(torch.tensor([[0.0, 5, 0, 6, 7, 0, 8, 0], [0, 0, 0, 9, 1, 2, 0, 0]]), Pattern(2, 4))
    assert packed.values.tolist() == [[5, 6, 7, 8], [0, 9, 1, 2]]
    assert packed.codes.tolist() == [[0b10_00_11_01], [0b01_00_11_00]]


def test_a_weight_that_breaks_the_pattern_is_refused():
    """A third non-zero, a non-zero off the mask, and a -0.0 that would become +0.0 are each named with their place."""
    weight = torch.tensor([[1.0, 2, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 2, 3, 0]])
    with pytest.raises(NotStrict, match="not 2:4: row 1, column 6 "):
        pack(weight, Pattern(2, 4))
    mask = torch.tensor([[True, False, True, False]])
    with pytest.raises(NotStrict, match="row 0, column 1 "):
        pack(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), Pattern(2, 4), mask)
    with pytest.raises(NotStrict, match="row 0, column 1 holds a number other than"):
        pack(torch.tensor([[1.0, -0.0, 1.0, 0.0]]), Pattern(2, 4))


def test_a_large_weight_is_packed_in_parts(monkeypatch):
    """The number of rows that are packed at once changes nothing."""
    weight = strategies.values("normal", (11, 16), 0)
    weight = weight * Pattern(2, 4).top(weight.abs()) + 0.0
    whole = pack(weight, Pattern(2, 4))
    monkeypatch.setattr("nmbench.runtime.packed.weight.PART", 40)
    parts = pack(weight, Pattern(2, 4))
    assert torch.equal(parts.values, whole.values) and torch.equal(parts.codes, whole.codes)


@many
@given(st.integers(1, 4), st.integers(0, 40), st.integers(0, 2**31))
def test_bits_come_back(rows, count, seed):
    """Bits of rows of any length are those that were packed."""
    drawn = torch.rand(rows, count, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = packed_bits(drawn)
    assert packed.shape == (rows, -(-count // 8))
    assert torch.equal(unpacked_bits(packed, count), drawn)
