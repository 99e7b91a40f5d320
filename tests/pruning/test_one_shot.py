"""Laws of one-shot pruning: methods get copies, results are checked layer by layer, dense weights are restored."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nmbench.errors import NMBenchError, NotStrict, NumericalFailure
from nmbench.methods import Baseline, LayerStats, Pruned, PrunedModel, Refiner, Scorer, Solver, Stat
from nmbench.models.applying import applied, apply
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.pattern import Pattern
from nmbench.pruning.one_shot import Made, prune_one_shot
from nmbench.runtime.cost import Cost
from nmbench_plugins.magnitude import Magnitude
from nmbench_plugins.sparsegpt import SparseGPT
from nmbench_plugins.swaps import Swaps
from nmbench_plugins.tiny import TinyModel
from nmbench_plugins.wanda import Wanda

TWO_FOUR = Pattern(2, 4)
BROKEN_INPUTS = r"inputs of layer model\.layers\.0\.self_attn\.q_proj hold NaN"
BAD = "model.layers.1.mlp.down_proj"  # the only layer of its block with 96 inputs
ALL = [
    Magnitude(),
    Wanda(),
    SparseGPT(),
    Swaps(dense_weight=0, sequential=False),
    Swaps(dense_weight=1, sequential=True),
]
methods = pytest.mark.parametrize("method", ALL, ids=lambda m: type(m).__name__)
waiting = pytest.mark.parametrize("later", [False, True], ids=["looks at once", "looks later"])
both_needs = pytest.mark.parametrize("needs", [Stat.NONE, Stat.INPUT_NORM], ids=["no walk", "walk"])


@functools.cache
def load(family: str = "llama") -> tuple[Bundle, DenseWeights]:
    bundle = TinyModel().load(family)
    return bundle, DenseWeights(bundle)


def windows() -> Tensor:
    return torch.randint(256, (6, 24), generator=torch.Generator().manual_seed(0))


def prune(
    method: Baseline,
    pattern: Pattern = TWO_FOUR,
    family: str = "llama",
    init: Baseline | None = None,
    deferred: bool | None = None,
) -> PrunedModel:
    """Prune a tiny model, and see to it that its weights are dense again, whatever happens."""
    return make(method, pattern, family, init, deferred).pruned


def make(
    method: Baseline,
    pattern: Pattern = TWO_FOUR,
    family: str = "llama",
    init: Baseline | None = None,
    deferred: bool | None = None,
) -> Made:
    """The same with its cost."""
    bundle, dense = load(family)
    patterns = dict.fromkeys(bundle.layers, pattern)
    init = init or start_of(method)
    try:
        return prune_one_shot(bundle, dense, method, patterns, windows(), "acme", init=init, deferred=deferred)
    finally:
        assert bundle.digest() == dense.digest
        assert not any(module._forward_pre_hooks for module in bundle.model.modules())


def prune_here(bundle: Bundle, method: Baseline, deferred: bool | None = None) -> PrunedModel:
    """Prune a bundle of one's own."""
    patterns = dict.fromkeys(bundle.layers, TWO_FOUR)
    return prune_one_shot(bundle, DenseWeights(bundle), method, patterns, windows(), "acme", deferred=deferred).pruned


def broken_embeddings() -> Bundle:
    """A model whose embedding of a token of the fourth window is NaN."""
    bundle = TinyModel().load("llama")
    bundle.model.get_input_embeddings().weight[windows()[3, 5]] = torch.nan
    return bundle


def start_of(method: Baseline) -> Baseline | None:
    return Wanda() if isinstance(method, Refiner) else None


def same_masks(a: PrunedModel, b: PrunedModel) -> bool:
    return a.masks.keys() == b.masks.keys() and all(torch.equal(a.masks[name], b.masks[name]) for name in a.masks)


def scorer(score: Callable[[Tensor, LayerStats], Tensor], wants: Stat = Stat.INPUT_NORM) -> Scorer:
    """A scorer that calls the function of the test."""

    @dataclass(frozen=True)
    class Acme(Scorer):
        needs = wants

        def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
            return score(weight, stats)

    return Acme()


def solver(solve: Callable[[Tensor, LayerStats, Pattern], Pruned], wants: Stat = Stat.INPUT_NORM) -> Solver:
    """A solver that calls the function of the test."""

    @dataclass(frozen=True)
    class Acme(Solver):
        needs = wants

        def solve(self, weight: Tensor, stats: LayerStats, pattern: Pattern) -> Pruned:
            return solve(weight, stats, pattern)

    return Acme()


def refiner(
    refine: Callable[[Tensor, Tensor], Pruned], wants: Stat = Stat.INPUT_NORM, in_turn: bool = False
) -> Refiner:
    """A refiner that calls the function of the test with weight and mask."""

    @dataclass(frozen=True)
    class Acme(Refiner):
        needs = wants
        sequential = in_turn

        def refine(self, weight: Tensor, stats: LayerStats, mask: Tensor, pattern: Pattern) -> Pruned:
            return refine(weight, mask)

    return Acme()


def in_bad_layer(usual: Callable[[Tensor], object], broken: Callable[[Tensor], object]) -> Callable[..., object]:
    """`broken` in the second layer with 96 inputs, which is `BAD`; `usual` elsewhere."""
    met = []

    def choose(weight: Tensor, *_: object) -> object:
        met.extend([weight.shape[1]] if weight.shape[1] == 96 else [])
        return broken(weight) if weight.shape[1] == 96 and len(met) % 2 == 0 else usual(weight)  # in every walk

    return choose


def good(weight: Tensor) -> Pruned:
    mask = TWO_FOUR.top(weight.abs())
    return Pruned(mask, torch.where(mask, weight, 0.0))


# What comes back


@methods
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_masks_are_strict_and_weights_dense_again(method, family):
    """Every layer gets a strict mask in the canonical view; afterwards the live weights are the dense ones."""
    pruned = prune(method, TWO_FOUR, family)
    bundle, _ = load(family)
    assert list(pruned.masks) == list(bundle.layers)
    for name, mask in pruned.masks.items():
        assert tuple(mask.shape) == bundle.layers[name].shape
        assert (TWO_FOUR.kept(mask) == 2).all()
    assert pruned.weights_changed == isinstance(method, Solver)


@methods
def test_pruning_is_repeatable(method):
    """The same method on the same bundle gives the same masks and weights, and draws no random number."""
    before = torch.get_rng_state()
    one, two = prune(method), prune(method)
    assert torch.equal(torch.get_rng_state(), before)
    assert same_masks(one, two)
    for name, layer in one.layers.items():
        assert layer.weight is None or torch.equal(layer.weight, two.layers[name].weight)


def test_patterns_by_layer():
    """Each layer is pruned to its own pattern."""
    bundle, dense = load()
    choices = [Pattern(2, 4), Pattern(4, 8), Pattern(1, 4), Pattern(3, 32)]
    patterns = {name: choices[index % 4] for index, name in enumerate(bundle.layers)}
    pruned = prune_one_shot(bundle, dense, Wanda(), patterns, windows(), "acme").pruned
    for name, mask in pruned.masks.items():
        assert (patterns[name].kept(mask) == patterns[name].keep).all()


def test_lower_layers_see_pruned_ones():
    """Pruning a block changes the statistics of the next block, and not its own."""
    seen: list[list[float]] = []

    def solve(keep_first: bool) -> list[float]:
        norms = []

        def choose(weight: Tensor, stats: LayerStats, pattern: Pattern) -> Pruned:
            norms.append(float(stats.input_norm.sum()))
            return Pruned(TWO_FOUR.top(weight.abs() if keep_first else -weight.abs()))

        prune(solver(choose))
        return norms

    seen = [solve(True), solve(False)]
    assert seen[0][:7] == seen[1][:7]
    assert all(a != b for a, b in zip(seen[0][7:], seen[1][7:], strict=True))


def test_only_prunable_layers():
    """Layers left dense by the user get no mask."""
    bundle = TinyModel().load("llama").without(["mlp.*"])
    patterns = dict.fromkeys(bundle.layers, TWO_FOUR)
    pruned = prune_one_shot(bundle, DenseWeights(bundle), Wanda(), patterns, windows(), "acme").pruned
    assert list(pruned.masks) == [name for name in load()[0].layers if ".mlp." not in name]


@methods
def test_cost(method):
    """A walk runs the calibration tokens twice through every block but the last, through which they need not pass on,
    and counts each once as unique; magnitude reads none.
    """
    cost = make(method).cost
    tokens = 0 if method.needs is Stat.NONE else windows().numel()
    beside = Stat.DRIFT in method.needs  # the dense model runs beside the pruned one
    passes = 4 * 2 + 1 + 1 if method.sequential else 2 + beside  # four turns of both models, and whose turn it is
    passes += 4 if Stat.LAG in method.needs else 0  # the probe for taps: as it is, and with three layers made noisy
    assert cost == Cost(forward_tokens=passes * tokens - tokens // 2, unique_tokens=tokens)  # of two blocks


@methods
def test_progress_ends_at_its_total(method):
    """Progress counts up to its total one by one."""
    bundle, dense = load()
    told = []
    prune_one_shot(
        bundle,
        dense,
        method,
        dict.fromkeys(bundle.layers, TWO_FOUR),
        windows(),
        "acme",
        lambda done, total: told.append((done, total)),
        start_of(method),
    )
    total = 14 if method.needs is Stat.NONE else 2
    assert told == [(done, total) for done in range(1, total + 1)]


# Methods get copies


@both_needs
def test_scorer_that_spoils_its_input(needs):
    """A scorer that writes into its weight argument changes no mask but its own, and no weight."""

    def spoil(weight: Tensor, stats: LayerStats) -> Tensor:
        score = weight.abs()
        weight.fill_(torch.nan)
        return score

    assert same_masks(prune(scorer(spoil, needs)), prune(scorer(lambda weight, stats: weight.abs(), needs)))


@both_needs
def test_solver_that_spoils_its_input(needs):
    """A solver that writes into its weight argument changes only its own result."""

    def spoil(weight: Tensor, *_: object) -> Pruned:
        pruned = good(weight)
        weight.fill_(torch.nan)
        return pruned

    assert same_masks(prune(solver(spoil, needs)), prune(solver(lambda weight, *_: good(weight), needs)))


def test_method_sees_detached_weights():
    """No gradient is recorded while a method works."""
    seen = []

    def score(weight: Tensor, stats: LayerStats) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return weight.abs()

    prune(scorer(score))
    assert seen == [False] * 14


# Refiners


@pytest.mark.parametrize("init", [Magnitude(), Wanda(), SparseGPT(), SparseGPT(mask_only=True)], ids=repr)
def test_a_refiner_is_handed_the_initial_mask(init):
    """A refiner starts from the mask that the initial method makes of the same statistics and dense weights."""
    bundle, _ = load()
    handed = []

    def keep(weight: Tensor, mask: Tensor) -> Pruned:
        handed.append(mask.clone())
        return Pruned(mask)

    pruned = prune(refiner(keep, Stat.NONE), init=init)
    assert not pruned.weights_changed
    assert all(map(torch.equal, handed, pruned.masks.values()))
    first_block = [name for name, layer in bundle.layers.items() if layer.block == 0]
    alone = prune(init)
    assert all(torch.equal(pruned.masks[name], alone.masks[name]) for name in first_block)
    if isinstance(init, Scorer):
        assert same_masks(pruned, alone)


def test_a_broken_initial_mask_is_blamed_on_its_method():
    """An initial mask that is not strict is refused before the refiner sees it, naming where it comes from."""
    broken = solver(lambda weight, *_: Pruned(torch.ones_like(weight, dtype=torch.bool)))
    with pytest.raises(NotStrict, match=r"^acme@init broke 2:4 in model.layers.0.self_attn.q_proj"):
        prune(refiner(lambda weight, mask: pytest.fail("was called")), init=broken)


def test_a_refiner_that_breaks_the_pattern_is_refused():
    """A refined mask is checked like any other."""
    with pytest.raises(NotStrict, match=r"^acme broke 2:4 in"):
        prune(refiner(lambda weight, mask: Pruned(~mask.roll(1, dims=1) | mask)))


def test_sequential_statistics():
    """A sequential method sees what the layers before in the block have become, another does not."""
    seen = []

    def sums(keep_first: bool, in_turn: bool) -> list[float]:
        norms: list[float] = []

        @dataclass(frozen=True)
        class Acme(Solver):
            needs = Stat.INPUT_NORM
            sequential = in_turn

            def solve(self, weight: Tensor, stats: LayerStats, pattern: Pattern) -> Pruned:
                norms.append(float(stats.input_norm.sum()))
                return Pruned(TWO_FOUR.top(weight.abs() if keep_first else -weight.abs()))

        prune(Acme())
        return norms

    seen = [[sums(keep_first, in_turn)[:7] for keep_first in (True, False)] for in_turn in (False, True)]
    assert seen[0][0] == seen[0][1] != seen[1][0]
    assert [a == b for a, b in zip(*seen[1], strict=True)] == [True] * 3 + [False] * 4  # q, k, v have dense inputs


def test_a_refiner_returns_no_weights():
    """Weights from a refiner are refused with layer and remedy, because its mask is measured on the dense weights."""
    with pytest.raises(NMBenchError, match=r"acme is a refiner and returned weights for .*q_proj.*the method a Solver"):
        prune(refiner(lambda weight, mask: Pruned(mask, weight.masked_fill(~mask, 0.0))))


def test_figures_are_averaged_over_layers():
    """A figure of several layers is kept as the mean over those that gave it."""
    given = iter([{"a": 1.0}, {"a": 2.0, "b": 5.0}, *[{}] * 12])

    def noted(weight: Tensor, mask: Tensor) -> Pruned:
        return Pruned(mask, figures=next(given))

    assert prune(refiner(noted)).figures == {"a": 1.5, "b": 5.0}


@waiting
def test_scores_become_masks_whenever_they_are_looked_at(later):
    """Checking statistics and scores after the walk changes no mask, and no work is done twice."""
    at_once, made = make(Wanda(), deferred=False), make(Wanda(), deferred=later)
    assert same_masks(made.pruned, at_once.pruned)
    assert made.cost == at_once.cost


# What is refused, and where


def test_broken_statistics_go_before_what_they_lead_to():
    """If checks are deferred, the error names the NaN inputs, not the method that fails because of them."""
    bundle = broken_embeddings()

    def particular(weight: Tensor, stats: LayerStats) -> Tensor:
        if not stats.input_norm.all():
            raise ValueError("I do not like zeros")
        return weight.abs()

    for method in (Wanda(), scorer(particular)):
        with pytest.raises(NumericalFailure, match=BROKEN_INPUTS):
            prune_here(bundle, method, deferred=True)


def test_whatever_falls_over_broken_numbers_does_not_hide_them():
    """If checks are deferred, the error names the NaN values, not a block that raises because of them."""
    bundle = broken_embeddings()

    def refuse(module: object, args: tuple[Tensor, ...]) -> None:
        if args[0].isnan().any():
            raise ValueError("NaN in hidden states")

    list(bundle.blocks.values())[1].mlp.register_forward_pre_hook(refuse)
    with pytest.raises(NumericalFailure, match=BROKEN_INPUTS):
        prune_here(bundle, Wanda(), deferred=True)


def test_what_is_broken_once_only_is_not_relied_on():
    """A method whose scores are NaN in the first walk and fine in the second has no result."""
    turns = iter([torch.nan])
    with pytest.raises(NumericalFailure, match=r"acme met NaN or infinite .* and did not when it was repeated"):
        prune(scorer(lambda weight, stats: weight.abs() * next(turns, 1.0)), deferred=True)


def test_scorers_are_given_finite_norms():
    """If checks are deferred, a scorer is given finite norms nevertheless, and broken inputs are named."""
    finite = []

    def noting(weight: Tensor, stats: LayerStats) -> Tensor:
        finite.append(bool(stats.input_norm.isfinite().all()))
        return weight.abs() * stats.input_norm

    with pytest.raises(NumericalFailure, match=BROKEN_INPUTS):
        prune_here(broken_embeddings(), scorer(noting), deferred=True)
    assert finite
    assert all(finite)


@waiting
def test_scores_elsewhere(later):
    """Scores on another device than the layer are refused with the method, the layer and both devices."""
    wrong = in_bad_layer(torch.abs, lambda weight: weight.to("meta"))
    with pytest.raises(NMBenchError, match=rf"acme failed in {BAD}: it returned scores on meta, the layer is on cpu"):
        prune(scorer(wrong), deferred=later)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_wanda_on_a_gpu():
    """On a GPU, where checks are deferred, masks are as good as on the CPU, and NaN gives the same error."""
    there = Bundle.of("it", TinyModel().load("llama").model.cuda(), None)
    pruned, expected = prune_here(there, Wanda()), prune(Wanda())
    for name, mask in pruned.masks.items():
        assert (mask.cpu() == expected.masks[name]).float().mean() > 0.99
    broken = Bundle.of("it", broken_embeddings().model.cuda(), None)
    with pytest.raises(NumericalFailure, match=BROKEN_INPUTS):
        prune_here(broken, Wanda())


def test_a_scorer_that_fails_is_called_once_more_only_if_numbers_are_to_blame():
    """Any other exception of a scorer is reported after its first call."""
    calls = []

    def fails(weight: Tensor, stats: LayerStats) -> Tensor:
        calls.append(1)
        raise ValueError("no")

    with pytest.raises(NMBenchError, match=r"acme failed in .*q_proj: ValueError: no"):
        prune(scorer(fails), deferred=True)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("needs", "later"), [(Stat.NONE, False), (Stat.INPUT_NORM, False), (Stat.INPUT_NORM, True)], ids=str
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_not_numbers(needs, value, later):
    """A NaN or infinite score is a numerical failure of that method in that layer, with deferred checks or not."""

    def broken(weight: Tensor) -> Tensor:
        return weight.abs().index_fill(0, torch.tensor([3]), value)

    with pytest.raises(NumericalFailure, match=rf"acme failed in {BAD}: score at \(3, 0\) is"):
        prune(scorer(in_bad_layer(torch.abs, broken), needs), deferred=later)


@both_needs
def test_scores_of_a_wrong_shape(needs):
    """Scores that do not have the shape of the weight are refused with both shapes and the layer."""
    with pytest.raises(NMBenchError, match=rf"acme failed in {BAD}: .*\(96, 64\) instead of \(64, 96\)"):
        prune(scorer(in_bad_layer(torch.abs, lambda weight: weight.abs().t()), needs))


@both_needs
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda w: Pruned(good(w).mask.t()), r"mask of shape \(96, 64\) instead of \(64, 96\)"),
        (lambda w: Pruned(good(w).mask.float()), "mask of torch.float32 instead of torch.bool"),
        (lambda w: Pruned(torch.ones_like(w, dtype=torch.bool)), r"broke 2:4 in .*: 1536 of 1536 groups"),
        (lambda w: Pruned(Pattern(1, 4).top(w)), "keep 1 instead of 2"),
        (lambda w: Pruned(Pattern(4, 8).top(w)), r"broke 2:4 in"),
        (lambda w: Pruned(good(w).mask, w), "non-zero weights off the mask"),
        (lambda w: Pruned(good(w).mask, w * good(w).mask), "negative zeros off the mask"),
        (lambda w: Pruned(good(w).mask, good(w).weight.t()), r"returned weights of shape \(96, 64\)"),
        (lambda w: Pruned(good(w).mask, torch.where(good(w).mask, torch.nan, 0.0)), "NaN or infinite weights"),
    ],
)
def test_what_a_solver_must_not_return(needs, broken, message):
    """Masks that are not strict and weights that do not fit their mask are refused, naming method and layer."""
    with pytest.raises(NMBenchError, match=message) as caught:
        prune(solver(in_bad_layer(good, broken), needs))
    assert str(caught.value).startswith("acme ")
    assert BAD in str(caught.value)
    assert isinstance(caught.value, NotStrict) or "shape" in message


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_dense_weights_after_any_exception(error):
    """Whatever a method raises goes through, errors with the name of the layer, and the dense weights are back."""

    def fail(weight: Tensor) -> Tensor:
        raise error("boom")

    with pytest.raises(NMBenchError if error is ValueError else error, match="boom") as caught:
        prune(scorer(in_bad_layer(torch.abs, fail)))
    if error is ValueError:
        assert str(caught.value) == f"acme failed in {BAD}: ValueError: boom"
        assert isinstance(caught.value.__cause__, ValueError)


def test_a_statistic_that_was_not_asked_for():
    """A method that reads a statistic missing from its `needs` fails with an error that names `needs`."""

    @dataclass(frozen=True)
    class Forgetful(Scorer):
        def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
            return weight.abs() * stats.input_norm

    with pytest.raises(NMBenchError, match="a statistic that its `needs` do not name is None"):
        prune(Forgetful())


def test_neither_scorer_nor_solver():
    """A baseline of no known kind is refused by its class."""

    @dataclass(frozen=True)
    class Odd(Baseline):
        pass

    with pytest.raises(NMBenchError, match="Odd is neither a Scorer, a Solver nor a Refiner"):
        prune(Odd())


# Masks alone, and applying


def test_mask_only():
    """`mask_only` keeps the masks of the full sweep, walked with repaired weights, and gives no weights."""
    full, alone = prune(SparseGPT()), prune(SparseGPT(mask_only=True))
    assert same_masks(full, alone)
    assert full.weights_changed
    assert not alone.weights_changed


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("mask_only", [False, True])
def test_apply(family, mask_only):
    """Applied, a layer holds repaired or dense weights where the mask keeps, and positive zeros elsewhere."""
    pruned = prune(SparseGPT(mask_only=mask_only), TWO_FOUR, family)
    bundle, dense = load(family)
    try:
        apply(bundle, pruned)
        for name, layer in bundle.layers.items():
            kept, live = pruned.masks[name], layer.read()
            source = dense.layer(layer) if mask_only else pruned.layers[name].weight
            assert torch.equal(live[kept], source[kept])
            assert not live[~kept].any()
            assert not live[~kept].signbit().any()
    finally:
        dense.restore()


def test_applied_in_the_dtype_of_the_model():
    """Repaired weights of another dtype are cast to the model's."""
    weight = torch.randn(2, 4, dtype=torch.bfloat16)
    mask = TWO_FOUR.top(weight.float().abs())
    result = applied(Pruned(mask, torch.where(mask, weight.double(), 0.0)), weight)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result[mask], weight[mask])


def test_notes_are_collected_by_layer():
    """A note on a layer is kept under the layer's name; empty ones do not."""

    def noted(weight: Tensor) -> Pruned:
        return Pruned(good(weight).mask, note="damping raised")

    assert prune(solver(in_bad_layer(good, noted))).layer_notes == {BAD: "damping raised"}


def test_magnitude_equals_its_definition():
    """A run through the host gives the mask that the definition gives layer by layer."""
    bundle, _ = load()
    pruned = prune(Magnitude(), Pattern(4, 8))
    for name, layer in bundle.layers.items():
        cells = layer.read().abs().view(-1, 8)
        weakest_kept = cells.sort(dim=1).values[:, 4:5]
        assert torch.equal(pruned.masks[name].view(-1, 8), cells >= weakest_kept)
