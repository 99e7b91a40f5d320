"""Laws of SparseGPT (arXiv 2301.00774), and equality of nmbench's masks with a plain implementation on a real model."""

import functools
import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmbench.data import draw
from nmbench.errors import NMBenchError, NumericalFailure
from nmbench.methods import LayerStats, Solver
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.pattern import Pattern
from nmbench.pruning.one_shot import choose, prune_one_shot
from nmbench.testing import strategies
from nmbench_plugins.demo import DemoModel, DemoPlays
from nmbench_plugins.sparsegpt import SparseGPT
from nmbench_plugins.sparsegpt.factor import damped_root, inverses, upper_root
from nmbench_plugins.sparsegpt.sweep import sweep
from nmbench_plugins.wanda import Wanda
from reference import one_shot

quick = settings(max_examples=24, deadline=None)
PATTERNS = [Pattern(*pair) for pair in ((1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (1, 3), (2, 3), (4, 6), (3, 10))]
seeds = st.integers(0, 2**31)


def layer(data: st.DataObject, kinds: tuple[str, ...] = ("normal", "ties", "one outlier")):
    pattern = data.draw(st.sampled_from(PATTERNS))
    return *data.draw(strategies.layers(pattern, kinds)), pattern


def problem(pattern: Pattern, rows: int, groups: int, seed: int) -> tuple[Tensor, Tensor]:
    """A float64 weight and the well-conditioned Hessian of correlated inputs."""
    columns = groups * pattern.group
    x = strategies.values("normal", (4 * columns, columns), seed).double()
    x[:, 1:] += 0.7 * x[:, :-1]
    return strategies.values("normal", (rows, columns), seed + 1).double(), 2 / 4 * x.T @ x


def root_of(hessian: Tensor) -> Tensor:
    return upper_root(hessian, hessian.diagonal())


def problems() -> st.SearchStrategy[tuple[Tensor, Tensor, Pattern]]:
    def make(pattern: Pattern, rows: int, groups: int, seed: int):
        return *problem(pattern, rows, groups, seed), pattern

    return st.builds(make, st.sampled_from(PATTERNS), st.integers(1, 5), st.integers(1, 5), seeds)


def diagonal_stats(energy: Tensor) -> LayerStats:
    """Statistics of uncorrelated inputs whose mean sums of squares over windows are `energy`."""
    return LayerStats(1, 1, energy.sqrt(), torch.diag(2 * energy))


def clear_cut(score: Tensor, pattern: Pattern, gap: float = 1e-4) -> bool:
    """Whether in every group the last kept and the first dropped score differ by more than rounding."""
    ordered = pattern.groups(score).sort(dim=-1, descending=True).values
    last, first = ordered[..., pattern.keep - 1], ordered[..., pattern.keep]
    return bool((last > first * (1 + gap)).all())


# What comes back


@quick
@given(st.data())
def test_solution_is_strict(data):
    """The mask keeps exactly N of every M, the repaired weight is zero off the mask, and the dtype is the weight's."""
    weight, stats, pattern = layer(data)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    before = weight.clone(), stats.gram.clone()
    pruned = SparseGPT().solve(weight.to(dtype), stats, pattern)
    assert (pattern.kept(pruned.mask) == pattern.keep).all()
    assert pruned.weight.dtype == dtype
    assert pruned.weight.isfinite().all()
    assert not pruned.weight[~pruned.mask].any()
    assert not pruned.weight[~pruned.mask].signbit().any()
    assert pruned.note == ""
    assert all(map(torch.equal, before, (weight, stats.gram)))


@quick
@given(problems())
def test_sweep_is_optimal_brain_surgeon(case):
    """The sweep through the root of H does what the paper's formulas do with the inverse of each submatrix."""
    weight, hessian, pattern = case
    mask, repaired = sweep(weight, root_of(hessian), pattern, 128)
    expected_mask, expected = one_shot.optimal_brain_surgeon(weight, hessian, pattern.keep, pattern.group)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(repaired, expected, rtol=1e-6, atol=1e-8)


@quick
@given(problems(), st.sampled_from([7, 128]))
def test_sweep_is_algorithm_1(case, columns):
    """Masks and weights are those of the paper's algorithm with U, the upper Cholesky factor of the inverse of H."""
    weight, hessian, pattern = case
    mask, repaired = sweep(weight, root_of(hessian), pattern, columns)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    expected, errors = weight.clone(), torch.zeros_like(weight)
    for c in range(weight.shape[1]):
        errors[:, c] = torch.where(mask[:, c], 0.0, expected[:, c] / upper[c, c])
        expected -= torch.outer(errors[:, c], upper[c])
    torch.testing.assert_close(repaired, expected.masked_fill(~mask, 0.0), rtol=1e-6, atol=1e-8)
    change = weight - repaired
    torch.testing.assert_close(change @ root_of(hessian), errors, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(errors.square().sum(), (change @ hessian @ change.T).trace())


@quick
@given(problems())
def test_sweep_leaves_what_it_is_given(case):
    """Weight and root are the same after a sweep."""
    weight, hessian, pattern = case
    given_weight, root = weight.clone(), root_of(hessian)
    given_root = root.clone()
    sweep(weight, root, pattern, 8)
    assert torch.equal(weight, given_weight) and torch.equal(root, given_root)


@quick
@given(problems(), st.integers(1, 60))
def test_block_size_does_not_matter(case, columns):
    """Sweeping in blocks of any width gives the mask and the weights of one sweep over everything."""
    weight, hessian, pattern = case
    root = root_of(hessian)
    mask, repaired = sweep(weight, root, pattern, columns)
    whole_mask, whole = sweep(weight, root, pattern, 10_000)
    assert torch.equal(mask, whole_mask)
    torch.testing.assert_close(repaired, whole)


@pytest.mark.parametrize("pattern", [Pattern(1, 3), Pattern(4, 6), Pattern(7, 10), Pattern(2, 4)], ids=str)
def test_groups_never_straddle_blocks(pattern):
    """With more columns than one block holds and an M that does not divide 128, the pattern holds."""
    weight, hessian = problem(pattern, 4, 300 // pattern.group, 0)
    stats = LayerStats(4, 4 * len(hessian), gram=hessian.float())
    pruned = SparseGPT().solve(weight.float(), stats, pattern)
    whole = SparseGPT(block_columns=10_000).solve(weight.float(), stats, pattern)
    assert (pattern.kept(pruned.mask) == pattern.keep).all()
    assert (pruned.mask ^ whole.mask).float().mean() < 0.01
    torch.testing.assert_close(pruned.weight[pruned.mask & whole.mask].norm(), whole.weight.norm(), rtol=0.01, atol=0)


# Where the answer is known


@quick
@given(st.data())
def test_diagonal_hessian_gives_wanda(data):
    """Uncorrelated inputs and damping 0: Wanda's mask away from near-ties, and kept weights as they were."""
    pattern = data.draw(st.sampled_from(PATTERNS))
    weight = data.draw(strategies.tensors(pattern, ("normal", "one outlier")))
    energy = strategies.values("normal", weight.shape[1:], data.draw(seeds)).square() + 0.01
    stats = diagonal_stats(energy)
    score = Wanda().score(weight, stats)
    assume(clear_cut(score, pattern))
    pruned = SparseGPT(damping=0.0).solve(weight, stats, pattern)
    assert torch.equal(pruned.mask, pattern.top(score))
    assert torch.equal(pruned.weight, torch.where(pruned.mask, weight, 0.0))


@quick
@given(st.data())
def test_pruning_twice_changes_nothing(data):
    """Pruning a pruned layer again gives the same weights, and the same groups unless a kept weight is 0."""
    weight, stats, pattern = layer(data)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    first = SparseGPT().solve(weight.to(dtype), stats, pattern)
    again = SparseGPT().solve(first.weight, stats, pattern)
    assert torch.equal(again.weight, first.weight)
    full = (pattern.groups(first.weight) != 0).sum(dim=-1) == pattern.keep
    assert torch.equal(pattern.groups(again.mask)[full], pattern.groups(first.mask)[full])


@quick
@given(problems(), st.integers(-8, 8))
def test_scale_of_the_inputs_does_not_matter(case, exponent):
    """Scaling all inputs by a power of two changes neither mask nor weights: damping is relative."""
    weight, hessian, pattern = case
    both = (LayerStats(4, 4, gram=hessian.float() * factor) for factor in (1.0, 4.0**exponent))
    one, two = (SparseGPT().solve(weight.float(), stats, pattern) for stats in both)
    assert torch.equal(one.mask, two.mask)
    assert torch.equal(one.weight, two.weight)


@quick
@given(st.sets(st.integers(0, 15), min_size=1, max_size=15), seeds)
def test_dead_inputs(dead, seed):
    """Weights of inputs that are always zero become 0 and never displace another, however large they were."""
    pattern, dead = Pattern(2, 4), sorted(dead)
    weight, hessian = problem(pattern, 3, 4, seed)
    hessian[dead], hessian[:, dead] = 0.0, 0.0
    stats = LayerStats(4, 64, gram=hessian.float())
    pruned = SparseGPT().solve(weight.float(), stats, pattern)
    assert not pruned.weight[:, dead].any()
    alive = pattern.groups(torch.ones(16).index_fill(0, torch.tensor(dead), 0.0)).sum(dim=-1)  # [groups]
    kept_alive = pattern.groups(pruned.weight != 0).sum(dim=-1)  # [rows, groups]
    assert torch.equal(kept_alive, alive.clamp(max=2).long().expand(3, 4))
    weight[:, dead] = 99.0
    assert torch.equal(SparseGPT().solve(weight.float(), stats, pattern).weight, pruned.weight)


def test_all_inputs_dead():
    """A layer that saw nothing but zeros becomes zero, with a strict mask."""
    pruned = SparseGPT().solve(torch.randn(2, 8), LayerStats(1, 16, gram=torch.zeros(8, 8)), Pattern(2, 4))
    assert (Pattern(2, 4).kept(pruned.mask) == 2).all()
    assert not pruned.weight.any()


# Damping


def damped(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    return damped_root(hessian, torch.zeros(len(hessian), dtype=torch.bool), damping)


@quick
@given(problems(), st.floats(0, 1))
def test_root_is_of_the_damped_hessian(case, damping):
    """R is upper triangular, R R^T = H + damping * mean(diag H), and R^-1 is the Cholesky factor of the inverse."""
    _, hessian, _ = case
    root, used = damped(hessian, damping)
    wanted = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    assert used == damping
    assert torch.equal(root, root.triu())
    torch.testing.assert_close(root @ root.T, wanted)
    factor = torch.linalg.cholesky(torch.linalg.inv(wanted), upper=True)
    torch.testing.assert_close(torch.linalg.inv(root), factor)


@quick
@given(problems(), st.integers(1, 60))
def test_inverses_are_blocks_of_the_whole_inverse(case, width):
    """Blocks on the diagonal of R are inverted as R is, and what a last block lacks is filled up with the identity."""
    root = root_of(case[1])
    columns = len(root)
    whole = torch.block_diag(torch.linalg.inv(root), torch.eye(-columns % width))
    blocks = inverses(root, width)
    assert torch.equal(blocks, blocks.triu())
    for block, start in zip(blocks, range(0, columns, width), strict=True):
        square = slice(start, start + width)
        torch.testing.assert_close(block, whole[square, square])


@quick
@given(seeds, st.sampled_from([3, 30, 300]))
def test_root_in_float32_is_as_good_as_inversion(seed, tokens):
    """In float32, R^-1 is as near to the exact factor of H^-1 as the factor of an explicit inverse is (or 1e-5)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    hessian = x.T @ x
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(48)
    exact = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True)
    explicit = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    (ours,) = inverses(root_of(hessian), 48)
    assert (ours - exact).norm() <= max(2 * (explicit - exact).norm(), 1e-5 * exact.norm())


def test_damping_is_raised_with_a_note():
    """A singular Hessian without damping is damped until it has a factor, and the note says by how much."""
    gram = torch.ones(4, 4)
    pruned = SparseGPT(damping=0.0).solve(torch.randn(2, 4), LayerStats(1, 1, gram=gram), Pattern(2, 4))
    assert pruned.note == "damping raised from 0 to 0.01"
    same = SparseGPT(damping=0.01).solve(pruned.weight, LayerStats(1, 1, gram=gram), Pattern(2, 4))
    assert same.note == ""


def test_damping_is_raised_tenfold():
    """Damping grows by ten at a time, and stays where the first factor exists."""
    gram = torch.tensor([[1.0, 1.05], [1.05, 1.0]])  # positive definite from 0.05 on
    _, damping = damped(gram, 0.003)
    assert damping == pytest.approx(0.3)


def test_hopeless_hessian_stops():
    """A Hessian that no damping mends is a numerical failure, never an identity in its place."""
    stats = LayerStats(1, 1, gram=-torch.eye(4))
    with pytest.raises(NumericalFailure, match="no Cholesky factor even with damping 1"):
        SparseGPT().solve(torch.randn(2, 4), stats, Pattern(2, 4))


@pytest.mark.parametrize("options", [{"damping": -0.1}, {"block_columns": 0}])
def test_impossible_options(options):
    """Negative damping and empty blocks are refused."""
    with pytest.raises(NMBenchError, match="sparsegpt needs damping >= 0 and block_columns >= 1"):
        SparseGPT(**options)


# Models, from end to end

METHODS = {
    "wanda": (Wanda(), one_shot.wanda),
    "sparsegpt": (SparseGPT(), one_shot.sparsegpt),
    "true-sequential": (SparseGPT(sequential=True), one_shot.sparsegpt),
}
TURNS = ("q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj")  # of a Llama block, inputs together
methods = pytest.mark.parametrize(
    "name", ["wanda", pytest.param("sparsegpt", marks=pytest.mark.slow), "true-sequential"]
)


def demo() -> Bundle:
    """The first two of the four blocks of the demo."""
    bundle = DemoModel().load("")
    bundle.model.model.layers = bundle.model.model.layers[:2]
    return Bundle.of("demo", bundle.model, bundle.tokenizer)


def wide() -> Bundle:
    """A random Llama with rows of 240 and 480 weights: more than a block of columns, and many M divide them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=240,
        intermediate_size=480,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Bundle.of("wide", LlamaForCausalLM(config), None)


@functools.cache
def text() -> Tensor:
    texts = list(DemoPlays().texts("calibration"))[:2]
    return draw(texts, demo().tokenizer, 4, 256, 0)


@functools.cache
def noise() -> Tensor:
    return torch.randint(256, (8, 256), generator=torch.Generator().manual_seed(0))


def parts(bundle: Bundle, sequential: bool) -> list[list[str]]:
    """The layers of a Llama that are pruned together, in order."""
    turns = TURNS if sequential else (" ".join(TURNS),)
    return [
        [layer.name for layer in bundle.block_layers(index) if layer.name.rpartition(".")[2] in turn.split()]
        for index in range(len(bundle.blocks))
        for turn in turns
    ]


def agree(make, windows: Tensor, name: str, pattern: Pattern) -> None:
    """Layer by layer, masks and repaired weights are those of plain code that is given the same inputs.

    Wanda's bit for bit. SparseGPT is factored in another way than the paper's, so that rounding may decide a near-tie
    otherwise, which changes the rest of the row; the plain model goes on with nmbench's weights, so that this is all.
    """
    bundle, plain = make(), make().model
    method, rule = METHODS[name]
    patterns = dict.fromkeys(bundle.layers, pattern)
    pruned = prune_one_shot(bundle, DenseWeights(bundle), method, patterns, windows, "it").pruned
    blocks = parts(bundle, method.sequential)
    names = iter([layer for block in blocks for layer in block])

    def compared(weight: Tensor, x: Tensor, keep: int, group: int) -> tuple[Tensor, Tensor]:
        layer = next(names)
        ours = pruned.layers[layer]
        mask, repaired = rule(weight.clone(), x, keep, group)
        if not isinstance(method, Solver):
            assert torch.equal(ours.mask, mask), layer
            return mask, repaired
        same = (ours.mask == mask).all(dim=1)
        assert same.float().mean() > 0.97, layer
        torch.testing.assert_close(ours.weight[same], repaired[same], rtol=1e-3, atol=1e-4)
        assert same.all() or near_ties(weight[~same], x, ours.mask[~same], mask[~same], pattern), layer
        return ours.mask, ours.weight

    masks = one_shot.prune(plain, blocks, windows, pattern.keep, pattern.group, compared)
    assert masks.keys() == pruned.masks.keys()


def near_ties(weight: Tensor, x: Tensor, ours: Tensor, theirs: Tensor, pattern: Pattern) -> bool:
    """Whether in the first group of a row that differs, scores in float64 say that either choice is as good."""
    flat = x.flatten(0, 1).double()
    hessian = flat.T @ flat * (2 / len(x))
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    work, score = weight.double(), torch.zeros_like(weight).double()
    for c in range(work.shape[1]):  # the paper's algorithm 1 with our mask
        if c % pattern.group == 0:
            group = slice(c, c + pattern.group)
            score[:, group] = work[:, group].abs() / upper.diagonal()[group]
        work -= torch.outer(torch.where(ours[:, c], 0.0, work[:, c] / upper[c, c]), upper[c])
    swapped = pattern.groups(ours ^ theirs)  # [rows, groups, group]
    first = swapped.any(dim=-1).int().argmax(dim=-1)  # [rows]; equal ones: the first
    rows = torch.arange(len(first))
    swapped, scores = swapped[rows, first], pattern.groups(score)[rows, first]  # [rows, group]
    largest, smallest = scores.where(swapped, -torch.inf).amax(-1), scores.where(swapped, torch.inf).amin(-1)
    return bool((largest <= smallest * (1 + 1e-3)).all())


@methods
def test_agreement_on_the_demo(name):
    """On blocks of the demo model and its text, masks and weights are those of an independent implementation."""
    agree(demo, text(), name, Pattern(2, 4))


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        *((pattern, "sparsegpt") for pattern in ("1:3", "5:10", "8:16")),
        ("5:10", "wanda"),
        *(pytest.param(pattern, "sparsegpt", marks=pytest.mark.slow) for pattern in ("3:6", "1:4", "4:8")),
    ],
)
def test_agreement_on_long_rows(pattern, name):
    """With more columns than a block holds, also where M does not divide it, masks and weights are the same, too."""
    agree(wide, noise(), name, Pattern.parse(pattern))


def test_mask_only_is_the_mask_of_the_sweep():
    """`mask_only` and the full method have one mask, sequential or not; the option takes the weights alone away."""
    bundle = wide()
    patterns = dict.fromkeys(bundle.layers, Pattern(2, 4))
    for sequential in (False, True):
        full, alone = (
            prune_one_shot(bundle, DenseWeights(bundle), method, patterns, noise()[:3], "it").pruned
            for method in (SparseGPT(sequential=sequential), SparseGPT(sequential=sequential, mask_only=True))
        )
        assert all(torch.equal(full.masks[layer], alone.masks[layer]) for layer in bundle.layers)
        assert (full.weights_changed, alone.weights_changed) == (True, False)


# Units of several weights


def swept_by_definition(weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
    """The mask of one sweep in plain loops: every choice of units is tried, with inverses of parts of the Hessian.

    The joint error of dropping the columns S of a unit, if all columns from S on compensate, is
    w_S ([H_FF^-1]_SS)^-1 w_S^T, where F are the columns from the first of S on.
    """
    weight, mask = weight.clone(), torch.zeros_like(weight, dtype=torch.bool)
    width, size = weight.shape[1], pattern.unit
    for first in range(0, width, pattern.group):
        starts = range(first, first + pattern.group, size)
        for row in range(len(weight)):
            errors = {}
            for at in starts:
                inverse = torch.linalg.inv(hessian[at:, at:])[:size, :size]
                own = weight[row, at : at + size]
                errors[at] = float(own @ torch.linalg.inv(inverse) @ own)
            choices = itertools.combinations(starts, pattern.keep // size)
            for at in max(choices, key=lambda kept: sum(errors[start] for start in kept)):
                mask[row, at : at + size] = True
        for column in range(first, first + pattern.group):
            inverse = torch.linalg.inv(hessian[column:, column:])
            error = weight[:, column].masked_fill(mask[:, column], 0.0) / inverse[0, 0]
            weight[:, column:] -= torch.outer(error, inverse[0])
    return mask


@quick
@given(st.sampled_from(["2:4x2", "1:3x2", "2:3x3", "1:2x4"]), st.integers(1, 3), st.integers(1, 3), seeds)
def test_units_are_chosen_by_their_joint_error(text, rows, groups, seed):
    """The units of every group have the highest joint errors of all choices, after the updates by the groups before."""
    pattern = Pattern.parse(text)
    weight, hessian = problem(pattern, rows, groups, seed)
    for block_columns in (1, 128):
        mask, repaired = sweep(weight, root_of(hessian), pattern, block_columns)
        assert torch.equal(mask, swept_by_definition(weight, hessian, pattern))
        assert not repaired[~mask].any()


def test_units_on_uncorrelated_inputs_are_those_of_wanda():
    """With a diagonal Hessian the joint error of a unit is Wanda's, and no weight has to be repaired."""
    pattern = Pattern.parse("2:4x2")
    weight = strategies.values("normal", (8, 32), 3)
    stats = diagonal_stats(strategies.values("normal", (32,), 4).square() + 0.1)
    pruned = SparseGPT(damping=0.0).solve(weight, stats, pattern)
    assert torch.equal(pruned.mask, choose(Wanda(), weight, stats, pattern).mask)
    assert torch.equal(pruned.weight, weight.masked_fill(~pruned.mask, 0.0))
