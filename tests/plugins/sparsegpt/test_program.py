"""SparseGPT's sweep as a Triton program against plain torch: interpreted, and on a GPU if there is one."""

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmbench.errors import NumericalFailure
from nmbench.methods import LayerStats
from nmbench.pattern import Pattern
from nmbench.runtime import triton_available
from nmbench.testing import strategies
from nmbench_plugins.sparsegpt import SparseGPT, launch, reference
from nmbench_plugins.sparsegpt.factor import damped_root, inverses
from nmbench_plugins.sparsegpt.sweep import block_width, sweep
from reference import triton_language

PATTERNS = [Pattern(*pair) for pair in ((1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (7, 8), (8, 16), (1, 16))]
MODULE = "nmbench_plugins.sparsegpt.program"
few = settings(max_examples=15, deadline=None, derandomize=True)  # the same rows every time: rounding may decide a tie
on_gpu = pytest.mark.skipif(not triton_available("cuda"), reason="needs an NVIDIA GPU and Triton")
in_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.fixture(scope="module")
def interpreted():
    with triton_language.interpreted(MODULE, own=["sum"]) as module:
        yield module


@pytest.fixture
def compiled():
    with triton_language.compiled():
        yield


def problem(rows: int, columns: int, seed: int, kind: str = "normal") -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of correlated inputs, both float32."""
    x = strategies.values("normal", (2 * columns, columns), seed)
    x[:, 1:] += 0.7 * x[:, :-1]
    return strategies.values(kind, (rows, columns), seed + 1), x.T @ x


def root_of(gram: Tensor) -> Tensor:
    return damped_root(gram, gram.diagonal() == 0, 0.01)[0]


def clear(weight: Tensor, root: Tensor, mask: Tensor, pattern: Pattern, columns: int) -> Tensor:
    """Rows where rounding cannot decide: with all weights moved a little, the plain sweep chooses the same mask."""
    moved = weight * (1 + 1e-4 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    return (sweep(moved, root, pattern, columns)[0] == mask).all(dim=1)  # [rows]


def agree(
    pattern: Pattern, rows: int, columns: int, block_columns: int, seed: int, kind: str, programs: Any = None
) -> None:
    """Program (None: compiled, on a GPU) and loop have equal masks and, but for rounding, equal weights.

    A row or two may have a near-tie.
    """
    weight, gram = problem(rows, columns, seed, kind)
    root = root_of(gram)
    mask, repaired = sweep(weight, root, pattern, block_columns)
    device = "cpu" if programs else "cuda"
    block = functools.partial(launch.sweep_block, programs=programs)
    ours = sweep(weight.to(device), root.to(device), pattern, block_columns, block)
    our_mask, our_weight = (tensor.cpu() for tensor in ours)
    assert (pattern.kept(our_mask) == pattern.keep).all()
    assert not our_weight[~our_mask].any() and not our_weight[~our_mask].signbit().any()
    same = (our_mask == mask).all(dim=1)
    assert (same | ~clear(weight, root, mask, pattern, block_columns)).all()
    torch.testing.assert_close(our_weight[same], repaired[same], rtol=1e-4, atol=1e-5 * float(weight.abs().max()))


@few
@given(
    st.sampled_from(PATTERNS),
    st.integers(1, 40),
    st.integers(1, 12),
    st.sampled_from([1, 24, 64, 128]),
    st.integers(0, 2**31),
    st.sampled_from(["normal", "one outlier"]),
)
def test_program_agrees_with_the_loop(interpreted, pattern, rows, groups, block_columns, seed, kind):
    """Masks and weights are those of the plain loop, for any number of rows, groups and blocks."""
    agree(pattern, rows, groups * pattern.group, block_columns, seed, kind, interpreted)


@pytest.mark.parametrize("columns", [160, 208, 272])
def test_blocks_of_full_width(interpreted, columns):
    """Blocks of 128 columns and a smaller one at the end: every tile of the program is used."""
    agree(Pattern(2, 4), 5, columns, 128, 0, "normal", interpreted)
    agree(Pattern(8, 16), 5, columns, 128, 0, "normal", interpreted)


@few
@given(st.sampled_from(PATTERNS), st.sampled_from(["zeros", "signed zeros", "ties"]), st.integers(0, 2**31))
def test_lower_index_wins(interpreted, pattern, kind, seed):
    """Uncorrelated inputs of one size, where scores tie exactly: the mask is that of the stable sort, bit for bit."""
    weight = strategies.values(kind, (7, 3 * pattern.group), seed)
    spread, pivots = torch.eye(weight.shape[1]), torch.ones(weight.shape[1])
    mask, expected = (torch.zeros(weight.shape, dtype=torch.bool) for _ in range(2))
    ours, theirs = weight.clone(), weight.clone()
    launch.sweep_block(ours, mask, spread, pivots, pattern, programs=interpreted)
    reference.sweep_block(theirs, expected, spread, pivots, pattern)
    assert torch.equal(mask, expected) and torch.equal(mask, pattern.top(weight.abs()))
    assert torch.equal(ours, theirs)


@in_pattern
def test_nothing_else_is_written(interpreted, pattern):
    """The columns and rows around a block stay as they are."""
    rows, columns = 3, 2 * pattern.group
    weight, gram = problem(rows, columns, 0)
    root = root_of(gram)
    large, marks = torch.full((rows + 2, columns + 32), 77.0), torch.ones(rows + 2, columns + 32, dtype=torch.bool)
    inner, mask = large[1:-1, 16:-16], marks[1:-1, 16:-16]
    inner.copy_(weight)
    spread, pivots = inverses(root, columns)[0], root.diagonal().contiguous()
    launch.sweep_block(inner, mask, spread, pivots, pattern, programs=interpreted)
    assert (pattern.kept(mask) == pattern.keep).all()
    inner.fill_(77.0)
    mask.fill_(True)
    assert (large == 77.0).all() and marks.all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [0, 5, 15])
def test_what_is_not_finite_does_not_go_unnoticed(interpreted, bad, column):
    """A weight that is not finite stops the sweep, by the program as by the loop."""
    weight, gram = problem(3, 16, 0)
    weight[1, column] = bad
    for step in (functools.partial(launch.sweep_block, programs=interpreted), reference.sweep_block):
        with pytest.raises(NumericalFailure):
            sweep(weight, root_of(gram), Pattern(2, 4), 128, step)


def test_infinite_errors_do_not_go_unnoticed(interpreted):
    """Where more scores are infinite than may be kept, a dropped one leaves its trace."""
    weight = torch.ones(1, 4)
    weight[0] = torch.inf
    mask = torch.zeros(1, 4, dtype=torch.bool)
    launch.sweep_block(weight, mask, torch.eye(4), torch.ones(4), Pattern(1, 4), programs=interpreted)
    assert not weight.isfinite().any()


def test_interpreting_leaves_no_trace(interpreted):
    """The fixture `compiled` undoes all that the interpreter changes in Triton's language, and only for one test."""
    agree(Pattern(2, 4), 3, 16, 128, 0, "normal", interpreted)
    after = triton_language.state()
    with triton_language.restored(triton_language.untouched()):
        assert triton_language.state() == triton_language.untouched()
        assert triton_language.state() != after
    assert triton_language.state() == after


@on_gpu
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("pattern", [*PATTERNS[:3], Pattern(4, 8), Pattern(8, 16)], ids=str)
def test_compiled_program_agrees_with_the_loop(pattern):
    """The same law on a GPU, with whole blocks, a smaller one at the end, and a number of rows that is odd."""
    agree(pattern, 77, 400, 128, 0, "normal")


@on_gpu
@pytest.mark.usefixtures("compiled")
def test_solver_uses_the_program_on_a_gpu():
    """SparseGPT on a GPU gives the masks and weights that it gives on a CPU, in the dtype of the weight."""
    weight, gram = problem(64, 512, 3)
    here = SparseGPT().solve(weight, LayerStats(1, 1, gram=gram), Pattern(2, 4))
    there = SparseGPT().solve(weight.cuda(), LayerStats(1, 1, gram=gram.cuda()), Pattern(2, 4))
    same = (there.mask.cpu() == here.mask).all(dim=1)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(there.weight.cpu()[same], here.weight[same], rtol=1e-3, atol=1e-4)
    assert SparseGPT().solve(weight.cuda().bfloat16(), LayerStats(1, 1, gram=gram.cuda()), Pattern(2, 4)).weight.dtype


def test_what_there_are_programs_for():
    """M of 2, 4, 8 and 16 in blocks of at most 128 columns, on NVIDIA GPUs; the rest is done by the loop."""
    assert all(launch.has_program(pattern, block_width(pattern, 128, 4096)) for pattern in PATTERNS)
    for pattern, width in ((Pattern(2, 3), 126), (Pattern(16, 32), 128), (Pattern(2, 4), 132)):
        assert not launch.has_program(pattern, width)
    assert not launch.usable(Pattern(2, 4), 128, torch.device("cpu"))
