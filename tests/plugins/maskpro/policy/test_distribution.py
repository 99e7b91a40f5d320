"""Laws of the MaskPro policy (arXiv 2506.12876): drawing N of M weights, its probability and its gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.errors import NMBenchError, NotStrict, NumericalFailure
from nmbench_plugins.maskpro import policy
from nmbench_plugins.maskpro.policy import groups
from reference import policy as reference
from reference.groups import KINDS, PATTERNS, cases, make, rng, spread

SMALL = [pattern for pattern in PATTERNS if pattern[1] <= 8]
quick = settings(max_examples=24, deadline=None)
few = settings(max_examples=20, deadline=None)  # where all masks of a group are enumerated


# Probability


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids="{0[0]}:{0[1]}".format)
def test_probabilities_sum_to_one(pattern, kind):
    """The probabilities of all C(M, N) masks of a group sum to 1."""
    logits, masks = spread(make(pattern, kind, 0, 1)[0][0], pattern[0])
    assert policy.log_prob(logits, masks).double().exp().sum() == pytest.approx(1, abs=3e-6)


@quick
@given(cases(SMALL))
def test_two_references_agree(case):
    """The subset recursion equals the sum over all orders of the drawn positions."""
    logits, mask = case
    if mask[0].sum() <= 4:
        orders = torch.stack([reference.log_prob_by_orders(row, kept) for row, kept in zip(*case, strict=True)])
        torch.testing.assert_close(reference.log_prob_by_subsets(logits, mask), orders, rtol=1e-12, atol=1e-12)


@quick
@given(cases())
def test_log_prob_is_that_of_the_enumeration(case):
    """In float32, log P equals the float64 enumeration to one part in a million, also with gaps of 1000."""
    logits, mask = case
    expected = reference.log_prob_by_subsets(logits, mask)
    torch.testing.assert_close(policy.log_prob(logits, mask).double(), expected, rtol=1e-6, atol=1e-6)


# Gradient


@few
@given(cases())
def test_gradient_is_that_of_the_enumeration(case):
    """The gradient in float32 equals autograd through the float64 enumeration to one part in a million of N."""
    logits, mask = case
    error = policy.grad_log_prob(logits, mask) - reference.grad_log_prob(logits, mask)
    assert error.abs().max() < 1e-6 * (1 + mask[0].sum())


@few
@given(cases())
def test_float64_is_computed_in_float64(case):
    """With float64 logits, log P and gradient equal the enumeration to twelve digits of the largest logit."""
    logits, mask = case[0].double(), case[1]
    scale = 1 + logits.abs().max().item()
    torch.testing.assert_close(
        policy.log_prob(logits, mask), reference.log_prob_by_subsets(logits, mask), rtol=1e-12, atol=1e-12
    )
    assert (policy.grad_log_prob(logits, mask) - reference.grad_log_prob(logits, mask)).abs().max() < 1e-12 * scale


@few
@given(cases())
def test_small_gradients_keep_their_digits(case):
    """A gradient down to 1e-6, as in groups that are nearly decided, is still right to one part in a thousand."""
    logits, mask = case
    expected = reference.grad_log_prob(logits.double(), mask)
    got = policy.grad_log_prob(logits, mask).double()
    decided = (expected.abs().amax(-1) < 1e-2) & (expected.abs().amax(-1) > 1e-6)
    error = (got - expected)[decided].abs().amax(-1) / expected[decided].abs().amax(-1)
    assert (error < 1e-3).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids="{0[0]}:{0[1]}".format)
def test_expected_gradient_is_zero(pattern, kind):
    """The gradient of log P, averaged over all masks with their probabilities, is 0."""
    logits, masks = spread(make(pattern, kind, 1, 1)[0][0], pattern[0])
    chance = policy.log_prob(logits, masks).double().exp()
    mean = (chance[:, None] * policy.grad_log_prob(logits, masks)).sum(0)
    assert mean.abs().max() < 1e-6 * (1 + pattern[0])


@quick
@given(cases([*PATTERNS, (16, 32), (3, 32), (31, 32)]))
def test_gradient_sums_to_zero_and_kept_is_not_negative(case):
    """In every group the gradient sums to 0; it is at least 0 for kept and at most 0 for dropped positions."""
    logits, mask = case
    gradient = policy.grad_log_prob(logits, mask)
    assert gradient.double().sum(-1).abs().max() < 1e-6 * (1 + mask[0].sum())
    assert (gradient[mask] >= 0).all()
    assert (gradient[~mask] <= 0).all()


# Symmetries


@quick
@given(cases([*PATTERNS, (16, 32)]), st.integers(-64, 64))
def test_shift_changes_nothing(case, shift):
    """Adding one number to all logits of a group changes neither log P nor its gradient."""
    logits, mask = (case[0] * 1024).round() / 1024, case[1]  # on a grid on which the shift is exact
    torch.testing.assert_close(
        policy.log_prob(logits + shift, mask), policy.log_prob(logits, mask), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        policy.grad_log_prob(logits + shift, mask), policy.grad_log_prob(logits, mask), rtol=0, atol=1e-6
    )


@quick
@given(cases([*PATTERNS, (16, 32)]), st.integers(0, 2**32))
def test_permutation_equivariance(case, seed):
    """Permuting the positions of a group leaves log P as it is and permutes the gradient."""
    logits, mask = case
    order = torch.randperm(logits.shape[-1], generator=rng(seed))
    tolerance = 1e-6 * (1 + mask[0].sum().item())
    torch.testing.assert_close(
        policy.log_prob(logits[:, order], mask[:, order]), policy.log_prob(logits, mask), rtol=1e-6, atol=tolerance
    )
    torch.testing.assert_close(
        policy.grad_log_prob(logits[:, order], mask[:, order]),
        policy.grad_log_prob(logits, mask)[:, order],
        rtol=0,
        atol=tolerance,
    )


@pytest.mark.parametrize("kind", ["normal", "flips", "gaps"])
def test_8_of_16_against_many_digits(kind):
    """In groups of 16, log P and gradient equal inclusion-exclusion in many digits to one part in a million of N."""
    check_exact((8, 16), kind)


@pytest.mark.parametrize(("keep", "kind"), [(13, "normal"), (24, "ties"), (31, "17")])
def test_wide_groups_against_many_digits(keep, kind):
    """In groups of 32, log P and gradient equal inclusion-exclusion in many digits to one part in a million of N."""
    check_exact((keep, 32), kind)


def check_exact(pattern: tuple[int, int], kind: str) -> None:
    logits, mask = make(pattern, kind, 5, 1)
    log_prob, gradient = reference.exact(logits[0], mask[0])
    assert policy.log_prob(logits, mask).item() == pytest.approx(log_prob, rel=1e-6, abs=1e-6)
    error = policy.grad_log_prob(logits, mask)[0].double() - torch.tensor(gradient, dtype=torch.float64)
    assert error.abs().max() < 1e-6 * (1 + pattern[0])


@pytest.mark.parametrize(("pattern", "kind"), [((3, 4), "gaps"), ((5, 8), "normal"), ((7, 8), "17")])
def test_many_digits_agree_with_the_enumeration(pattern, kind):
    """Inclusion-exclusion in many digits and the float64 enumeration, two different formulas, agree."""
    logits, mask = make(pattern, kind, 3, 1)
    log_prob, gradient = reference.exact(logits[0], mask[0])
    assert reference.log_prob_by_subsets(logits, mask).item() == pytest.approx(log_prob, rel=1e-12, abs=1e-12)
    torch.testing.assert_close(
        reference.grad_log_prob(logits, mask)[0], torch.tensor(gradient, dtype=torch.float64), rtol=0, atol=1e-9
    )


@quick
@given(st.sampled_from(PATTERNS), st.integers(0, 2**32), st.integers(1, 11), st.integers(1, 64))
def test_chunks_do_not_change_draws(pattern, seed, cut, size):
    """On the CPU, drawing in two parts, or with another chunk size, gives the draws of one call; so do the values."""
    logits = torch.randn(12, pattern[1], generator=rng(seed))
    whole = policy.sample(logits, pattern[0], rng(seed))
    generator = rng(seed)
    parts = [policy.sample(part, pattern[0], generator) for part in (logits[:cut], logits[cut:])]
    assert (torch.cat(parts) == whole).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(groups.CHUNK_WEIGHTS, "cpu", size)
        assert (policy.sample(logits, pattern[0], rng(seed)) == whole).all()
        small = policy.log_prob(logits, whole), policy.grad_log_prob(logits, whole)
    torch.testing.assert_close(
        small, (policy.log_prob(logits, whole), policy.grad_log_prob(logits, whole)), rtol=2e-6, atol=2e-6
    )


# Shapes, dtypes, errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("pattern", [(2, 4), (3, 4), (5, 8)])
def test_shapes_and_dtypes(pattern, dtype):
    """Results have the leading axes and dtype of the logits, arguments stay as they are, half counts in float32."""
    keep, group = pattern
    logits = torch.randn(2, 3, group, generator=rng(0)).to(dtype).requires_grad_()
    kept = logits.detach().clone()
    mask = policy.sample(logits, keep, rng(1))
    log_prob, gradient = policy.log_prob(logits, mask), policy.grad_log_prob(logits, mask)
    assert log_prob.shape == (2, 3)
    assert gradient.shape == mask.shape == (2, 3, group)
    assert log_prob.dtype == gradient.dtype == dtype
    assert not gradient.requires_grad
    assert torch.equal(logits, kept)
    wide = kept.double() if dtype == torch.float64 else kept.float()
    assert torch.equal(gradient, policy.grad_log_prob(wide, mask).to(dtype))


def test_strided_and_empty_inputs():
    """Strided logits give what their contiguous copy gives; no groups give empty results."""
    logits = torch.randn(8, 6, generator=rng(0)).t()
    mask = policy.sample(logits, 5, rng(1))
    assert torch.equal(policy.grad_log_prob(logits, mask), policy.grad_log_prob(logits.contiguous(), mask))
    none = torch.zeros(0, 3, 4)
    assert policy.sample(none, 2, rng(0)).shape == policy.grad_log_prob(none, none.bool()).shape == (0, 3, 4)
    assert policy.log_prob(none, none.bool()).shape == (0, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_logits_are_refused(value):
    """One NaN or infinite logit is an error that says how many there are; huge finite ones are not."""
    logits = torch.zeros(3, 4)
    mask = policy.sample(logits, 2, rng(0))
    logits[1, 2] = value
    for call in (
        lambda: policy.sample(logits, 2, rng(0)),
        lambda: policy.log_prob(logits, mask),
        lambda: policy.grad_log_prob(logits, mask),
    ):
        with pytest.raises(NumericalFailure, match="1 NaN or Inf values of 12"):
            call()
    huge = torch.full((3, 4), 1.0, dtype=torch.float16) * 60_000  # the sum overflows, the values do not
    assert policy.grad_log_prob(huge, mask).isfinite().all()


def test_uneven_mask_is_refused():
    """A mask whose groups keep different numbers is an error that names the first such group."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0]], dtype=torch.bool)
    with pytest.raises(NotStrict, match="keeps 2 weights in group 0 and 3 in group 2"):
        policy.grad_log_prob(torch.zeros(3, 4), mask)


@pytest.mark.parametrize("call", [
    lambda: policy.sample(torch.zeros(2, 4), 4, rng(0)),
    lambda: policy.sample(torch.zeros(2, 4), 0, rng(0)),
    lambda: policy.sample(torch.zeros(2, 40), 4, rng(0)),
    lambda: policy.sample(torch.zeros(2, 4, dtype=torch.int64), 2, rng(0)),
    lambda: policy.log_prob(torch.zeros(2, 4), torch.ones(2, 4)),
    lambda: policy.log_prob(torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool)),
    lambda: policy.log_prob(torch.zeros(2, 4), torch.ones(1, 4, dtype=torch.bool)),
])  # fmt: skip
def test_wrong_arguments_are_refused(call):
    """A pattern, dtype or shape that means nothing is an NMBenchError that says what was expected."""
    with pytest.raises(NMBenchError, match="expected"):
        call()
