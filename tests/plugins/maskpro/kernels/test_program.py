"""Laws of the fused MaskPro step; its programs run in Triton's interpreter, and on a GPU where there is one."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmbench_plugins.maskpro import policy
from nmbench_plugins.maskpro.kernels import launch
from nmbench_plugins.maskpro.policy import gumbel
from reference import policy as enumeration
from reference import triton_language
from reference.kernel_layers import Layer, make, make_logits

MODULES = ("nmbench_plugins.maskpro.kernels.program", "nmbench_plugins.maskpro.kernels.group_program")
PATTERNS = sorted(launch.FUSED)
KINDS = ["normal", "ties", "prior", "gaps", "17", "100", "1000"]
WEIGHTS = [torch.bfloat16, torch.float16, torch.float32]
few = settings(
    max_examples=12, deadline=None, derandomize=True
)  # the same groups every time: rounding may decide a draw
in_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids="{0[0]}:{0[1]}".format)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")


@pytest.fixture(scope="module")
def interpreted():
    with triton_language.interpreted(*MODULES) as module:
        yield module


shapes = st.tuples(st.integers(1, 5), st.integers(1, 9)).map(lambda shape: (shape[0], shape[1] * 8))
cases = {
    "pattern": st.sampled_from(PATTERNS),
    "shape": shapes,
    "kind": st.sampled_from(KINDS),
    "seed": st.integers(0, 2**32),
    "logits": st.sampled_from([torch.float32, torch.float16]),
    "weight": st.sampled_from(WEIGHTS),
}
ONE = torch.ones(1)


# Programs and reference


def agree(pattern, shape, kind, seed, logits, weight, programs=None, device="cpu"):
    """Draw, update and draw, update: masked weights, logits and borders are those of the reference."""
    ours = make(pattern, shape, kind, seed, logits, weight, programs, device)
    theirs = make(pattern, shape, kind, seed, logits, weight)
    scale = 1.5 * ONE
    for step, update, draw in ((7, False, True), (8, True, True), (9, True, False)):
        theirs.logits.copy_(ours.logits)  # the same start: rounding does not add up
        ours.step(pattern, step, scale, update, draw, seed)
        theirs.reference_step(pattern, step, scale, update, False, seed)
        # A float16 may round the other way where the sums differ in their last bit.
        tolerance = 4e-5 if logits == torch.float32 else 0.6 if kind in ("gaps", "1000", "100") else 0.02
        torch.testing.assert_close(ours.logits.cpu(), theirs.logits, rtol=1e-7, atol=tolerance)
        theirs.logits.copy_(ours.logits)  # where logits nearly tie the last bit decides
        theirs.reference_step(pattern, step, scale, False, draw, seed)
        torch.testing.assert_close(ours.out.cpu(), theirs.out, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(ours.borders(), theirs.borders())


@few
@given(**cases)
def test_programs_agree_with_their_reference(interpreted, pattern, shape, kind, seed, logits, weight):
    """Masked weights are equal, logits to 4e-5, and nothing else is written."""
    agree(pattern, shape, kind, seed, logits, weight, interpreted)


@pytest.mark.parametrize("shape", [(1, 4), (3, 12), (5, 4), (3, 68)], ids=str)
def test_odd_numbers_of_groups(interpreted, shape):
    """A chunk may be cut in half by the end of the layer, or by the end of a row."""
    for logits, weight in ((torch.float32, torch.bfloat16), (torch.float16, torch.float32)):
        agree((2, 4), shape, "normal", 3, logits, weight, interpreted)


@on_gpu
@in_pattern
@pytest.mark.parametrize("logits", [torch.float32, torch.float16], ids=str)
def test_compiled_programs_agree_with_their_reference(pattern, logits):
    """The same law on a GPU."""
    weight = torch.bfloat16 if logits == torch.float32 else torch.float32
    for kind, shape in (("normal", (30, 1000)), ("gaps", (2, 88))):
        agree(pattern, shape, kind, 1, logits, weight, device="cuda")


@on_gpu
def test_a_captured_step_reads_its_number_from_the_device():
    """Replays of one CUDA graph draw what calls with the numbers 1, 2, 3 draw."""
    ours, theirs = (make((2, 4), (64, 256), device="cuda") for _ in range(2))
    step, scale = torch.zeros(1, dtype=torch.int64, device="cuda"), torch.full((1,), 0.1, device="cuda")
    call = partial(launch.step, keep=2, group=4, seed=1, first_group=0, scale=scale, update=True, draw=True)
    call(*(tensor.clone() for tensor in (ours.logits, ours.weight, ours.out)), step=step)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.add_(1)
        call(ours.logits, ours.weight, ours.out, step=step)
    for number in (1, 2, 3):
        graph.replay()
        call(theirs.logits, theirs.weight, theirs.out, step=torch.full_like(step, number))
        assert torch.equal(ours.out, theirs.out) and torch.equal(ours.logits, theirs.logits)


# Draws


@few
@given(pattern=cases["pattern"], kind=cases["kind"], weight=cases["weight"], seed=cases["seed"])
def test_masked_weights_are_strict(interpreted, pattern, kind, weight, seed):
    """Every group keeps exactly `keep` weights, bit for bit, also NaN; the others are +0.0, whatever they were."""
    layer = make(pattern, (6, 40), kind, seed, weight=weight, programs=interpreted)
    layer.weight[0], layer.weight[1], layer.weight[2] = torch.nan, -torch.inf, -1
    layer.step(pattern, 3, ONE, update=False)
    integer = torch.int32 if weight == torch.float32 else torch.int16
    out = layer.out.view(integer)
    assert (out.ne(0).view(-1, pattern[1]).sum(-1) == pattern[0]).all()
    assert torch.equal(out, layer.weight.view(integer) * out.ne(0))


def drawn_sets(logits: Tensor, pattern, n: int, programs: Any) -> tuple[Tensor, Tensor]:
    """How often each mask of the pattern was drawn in n groups, and its log probability."""
    masks = enumeration.all_masks(*pattern)  # [sets, group]
    layer = Layer((n, pattern[1]), logits.repeat(n, 1), torch.ones(n, pattern[1]).bfloat16(), programs)
    layer.step(pattern, 0, ONE, update=False)
    bits = 2 ** torch.arange(pattern[1])
    order = (masks * bits).sum(-1)
    codes = (layer.kept() * bits).sum(-1)
    counts = torch.bincount(codes, minlength=2 ** pattern[1])[order]
    return counts, policy.log_prob(logits.double().expand(masks.shape), masks)


@in_pattern
@pytest.mark.parametrize("kind", ["normal", "0", "3", "17", "100", "1000", "steps", "two"])
def test_draws_follow_the_law(interpreted, pattern, kind):
    """Masks are drawn as often as P(S) says, over all C(M, N) of them; those of no probability never."""
    group = pattern[1]
    special = {"steps": torch.arange(group) * 1.0, "two": torch.tensor([1000.0, 900, 1, 0] * (group // 4))}
    logits = special.get(
        kind, make_logits(kind if kind not in special else "0", (1, group), group, torch.Generator())[0]
    )
    n = 2**15
    counts, log_prob = drawn_sets(logits, pattern, n, interpreted)
    expected = n * log_prob.exp()
    assert counts.sum() == n and not counts[log_prob < -40].any()
    rare = expected < 8
    observed = torch.cat((counts[~rare], counts[rare].sum()[None])).double()
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    used = expected > 1e-3
    assert not observed[~used].any()
    statistic = ((observed - expected) ** 2 / expected)[used].sum()
    freedom = torch.tensor(max(1, int(used.sum()) - 1) / 2).double()
    assert torch.special.gammaincc(freedom, statistic / 2) > 1e-4


def test_seeds_and_steps_differ(interpreted):
    """Another step, or a seed with other low or other high bits, draws an independent mask."""
    layer = make((2, 4), (64, 256), "0", programs=interpreted)
    layer.step((2, 4), 5, ONE, update=False)
    first = layer.kept()
    for step, seed in ((6, 2**63 + 9), (5, 2**63 + 10), (5, 9)):
        layer.step((2, 4), step, ONE, update=False, seed=seed)
        other = layer.kept()
        same = (other == first).view(-1, 4).all(-1).sum()
        assert same == pytest.approx(4096 / 6, abs=5 * (4096 * 5 / 36) ** 0.5)  # one of six masks, 5 deviations


# Updates


@few
@given(pattern=cases["pattern"], kind=cases["kind"], seed=cases["seed"])
def test_updates_use_the_mask_that_was_drawn(interpreted, pattern, kind, seed):
    """The change of the logits is the gradient at the mask that the weights showed, to 4e-5, gaps of 1000 included."""
    layer = make(pattern, (64, 32), kind, seed, programs=interpreted)
    layer.step(pattern, 3, ONE, update=False)
    kept, before = layer.kept(), layer.logits.double()
    size = 2.0**11  # far above the last bits of logits of 1000
    layer.step(pattern, 4, size * ONE, draw=False)
    expected = policy.grad_log_prob(before.view(-1, pattern[1]), kept.view(-1, pattern[1]))
    change = (layer.logits.double() - before).view(-1, pattern[1]) / size
    torch.testing.assert_close(change, expected, rtol=0, atol=4e-5)


@in_pattern
def test_many_steps_stay_in_step(interpreted, pattern):
    """Logits that only ever met the programs end where single gradients of the shown masks lead."""
    layer = make(pattern, (16, 64), "prior", programs=interpreted)
    layer.step(pattern, 0, ONE, update=False)
    expected = layer.logits.double()
    for step in range(1, 6):
        rows = expected.view(-1, pattern[1])
        slope = policy.grad_log_prob(rows, layer.kept().view(-1, pattern[1]))
        expected = expected + 0.7 * slope.view(expected.shape)
        layer.step(pattern, step, 0.7 * ONE)
    torch.testing.assert_close(layer.logits.double(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("size", [1e-6, 3e-5, 1.0, 777.7])
def test_rounding_to_float16_is_unbiased(interpreted, size):
    """1:4 from equal logits: 0.75 and -0.25 of the factor round to a neighbour each, and right on average."""
    n = 2**14
    layer = Layer((n, 4), torch.zeros(n, 4).half(), torch.ones(n, 4).bfloat16(), interpreted)
    layer.step((1, 4), 3, ONE, update=False)
    kept = layer.kept()
    layer.step((1, 4), 4, torch.tensor([size]), draw=False)
    for values, exact in ((layer.logits[kept], 0.75 * size), (layer.logits[~kept], -0.25 * size)):
        low, high = values.min().double(), values.max().double()
        assert low <= exact <= high and high - low <= max(2**-24, abs(exact) * 2**-10)
        deviation = float(high - low) / 2 / len(values) ** 0.5
        assert float(values.double().mean()) == pytest.approx(exact, abs=5 * deviation + 1e-6 * abs(exact))


def test_float16_logits_stay_finite(interpreted):
    """Beyond its range the largest float16 is kept."""
    layer = Layer((2, 32), torch.full((2, 32), 60000.0).half(), torch.ones(2, 32).bfloat16(), interpreted)
    layer.step((1, 4), 1, torch.tensor([1e6]))
    assert layer.logits.unique().tolist() == [-65504, 65504]


# The end


@few
@given(pattern=cases["pattern"], kind=cases["kind"], logits=cases["logits"], weight=cases["weight"], shape=shapes)
def test_greedy_keeps_the_largest(interpreted, pattern, kind, logits, weight, shape):
    """The `keep` largest logits of every group, lower index on ties; the others are +0.0."""
    layer = make(pattern, shape, kind, 0, logits, weight, interpreted)
    launch.greedy(layer.logits, layer.weight, layer.out, *pattern, launch=layer.launch, programs=interpreted)
    expected = gumbel.top(layer.logits.reshape(-1, pattern[1]).t(), pattern[0]).t().reshape(shape)
    assert torch.equal(layer.out, torch.where(expected, layer.weight, 0)) and not layer.out.signbit()[~expected].any()
