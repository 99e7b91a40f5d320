"""Laws of the inverse by blocks (`nmbench_plugins.alps.inverse`), against float64 solutions."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.testing import strategies
from nmbench_plugins.alps.inverse import inverse_of, triangular_inverse

quick = settings(max_examples=30, deadline=None)
sizes, widths, seeds = st.integers(1, 40), st.sampled_from([1, 3, 8, 16, 64]), st.integers(0, 2**31)


def factor(size: int, seed: int) -> torch.Tensor:
    """A lower triangular float64 matrix with a positive diagonal."""
    x = strategies.values("normal", (2 * size + 1, size), seed).double()
    return torch.linalg.cholesky(x.T @ x + 0.1 * torch.eye(size, dtype=torch.float64))


@quick
@given(sizes, widths, seeds)
def test_triangular_inverse(size, width, seed):
    """The inverse is exact up to rounding and lower triangular, for blocks of any size."""
    lower = factor(size, seed)
    found = triangular_inverse(lower.clone(), width)
    torch.testing.assert_close(found @ lower, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-9)
    assert not found.triu(1).any()


@quick
@given(sizes, widths, seeds)
def test_inverse_of_a_factor(size, width, seed):
    """(L L^T)^-1 is that of torch, symmetric, and in float32 as close to it as float32 allows."""
    lower = factor(size, seed)
    expected = torch.cholesky_inverse(lower)
    found = inverse_of(lower.clone(), width)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, found.T, rtol=1e-12, atol=1e-12)
    single = inverse_of(lower.float(), width)
    theirs = (torch.cholesky_inverse(lower.float()) - expected).norm()
    assert (single - expected).norm() <= 4 * theirs + 1e-5 * expected.norm()
