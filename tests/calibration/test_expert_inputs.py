"""Laws of fused experts: each is a layer, with the statistics of the tokens routed to it, however they are computed."""

import pytest
import torch
from torch import Tensor, nn

from nmbench.calibration.expert_inputs import ExpertObserver, observing_experts
from nmbench.calibration.walk import walk
from nmbench.errors import NMBenchError
from nmbench.methods import PrunedModel, Solver, Stat
from nmbench.models.applying import apply
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.pattern import Pattern
from nmbench.pruning.one_shot import prune_one_shot
from nmbench_plugins.sparsegpt import SparseGPT
from nmbench_plugins.swaps import Swaps
from nmbench_plugins.tiny import TinyModel
from nmbench_plugins.wanda import Wanda
from reference import experts, one_shot
from reference.tiers import tiered

BOTH = Stat.INPUT_NORM | Stat.GRAM
TWO_FOUR = Pattern(2, 4)
WAYS = ("eager", "grouped_mm", "batched_mm")
FAMILIES = ("mixtral", "qwen3moe")
families = pytest.mark.parametrize("family", FAMILIES)
ways = pytest.mark.parametrize("way", WAYS)
walks = pytest.mark.parametrize(
    ("family", "way", "sequential"),
    tiered(FAMILIES, WAYS, [False, True], fast=lambda family, way, sequential: not sequential or way == "grouped_mm"),
)


def load(family: str = "mixtral", way: str | None = None, dtype: str = "float32") -> Bundle:
    bundle = TinyModel(dtype=dtype).load(family)
    if way is not None:
        bundle.model.set_experts_implementation(way)
    return bundle


def random_windows(count: int = 6, tokens: int = 24) -> Tensor:
    return torch.randint(256, (count, tokens), generator=torch.Generator().manual_seed(0))


def one_token() -> Tensor:
    """Windows of one token repeated, so that few experts are chosen."""
    return torch.full((2, 8), 7)


def fused(bundle: Bundle) -> list[str]:
    return [name for name, layer in bundle.layers.items() if layer.fused]


def routing(bundle: Bundle, windows: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What every module with fused experts is given in a plain forward pass, by its name: hidden states and choices."""
    seen = {}
    modules = {name: bundle.model.get_submodule(name) for name in experts.modules(fused(bundle))}
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: (args[0], args[1])}))
        for name, module in modules.items()
    ]
    bundle.model(input_ids=windows)
    for handle in handles:
        handle.remove()
    return seen


def prune(bundle: Bundle, method, windows: Tensor, init=None) -> PrunedModel:
    patterns = dict.fromkeys(bundle.layers, TWO_FOUR)
    return prune_one_shot(bundle, DenseWeights(bundle), method, patterns, windows, "it", init=init).pruned


# What is heard


@families
@ways
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_inputs_are_those_of_a_plain_loop(family, way, dtype):
    """Whichever way transformers computes experts, each is heard to be given the tokens routed to it, and nothing
    else; the model returns what it returns when nobody listens.
    """
    bundle, windows = load(family, way, dtype), random_windows()
    plain = one_shot.inputs(bundle.model, fused(bundle), windows)
    logits = bundle.model(input_ids=windows).logits
    heard: dict[str, list[Tensor]] = {name: [] for name in fused(bundle)}
    observers = [ExpertObserver(bundle.layers[n].module, bundle.layers[n].where, heard[n].append) for n in heard]
    with observing_experts(observers):
        assert torch.equal(bundle.model(input_ids=windows).logits, logits)
    assert not any("forward" in vars(module) for module in bundle.model.modules())
    tolerance = 1e-5 if dtype == "float32" else 0.01
    for name, parts in heard.items():
        got = torch.cat(parts) if parts else plain[name][:0]
        assert got.shape == plain[name].shape
        ours, theirs = (rows.double().T @ rows.double() for rows in (got, plain[name]))  # tokens come in any order
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@walks
def test_statistics_do_not_depend_on_the_way(family, way, sequential):
    """The walk gathers the same statistics however transformers computes the experts, those of a plain loop."""
    bundle, windows = load(family, way), random_windows()
    plain = one_shot.inputs(bundle.model, fused(bundle), windows)
    for step in walk(bundle, windows, BOTH, sequential):
        assert not step.fallbacks
        for layer in (layer for layer in step.layers if layer.fused):
            x, got = plain[layer.name].double(), step.stats[layer.name]
            assert got.tokens == len(x)
            scale = float(got.gram.abs().max())
            torch.testing.assert_close(got.gram.double(), 2 / 6 * x.T @ x, rtol=1e-4, atol=1e-5 * scale)
            torch.testing.assert_close(got.input_norm.double() ** 2, x.square().sum(0) / 6, rtol=1e-4, atol=1e-12)


@families
def test_every_choice_is_counted(family):
    """The tokens of all experts of a parameter are those of the module times the choices of the router."""
    bundle, windows = load(family), random_windows()
    for step in walk(bundle, windows, Stat.INPUT_NORM):
        for parameter in ("gate_up_proj", "down_proj"):
            counts = [s.tokens for name, s in step.stats.items() if f"{parameter}[" in name]
            assert sum(counts) == 2 * windows.numel()


# Too few tokens


@walks
def test_experts_that_no_token_reached(family, way, sequential):
    """They are named, and have the statistics that they have if all tokens are routed to them."""
    bundle, windows = load(family, way), one_token()
    given = routing(bundle, windows)
    named = []
    for step in walk(bundle, windows, BOTH, sequential):
        named += step.fallbacks
        for name in step.fallbacks:
            module, parameter, expert = experts.EXPERT.fullmatch(name).groups()
            hidden, chosen = given[module]
            assert int(expert) not in chosen
            everywhere = torch.full_like(chosen[:, :1], int(expert))
            x = experts.inputs(bundle.model.get_submodule(module), hidden, everywhere, int(expert), parameter).double()
            got = step.stats[name]
            assert got.tokens == len(x) == windows.numel()
            torch.testing.assert_close(got.gram.double(), 2 / 2 * x.T @ x, rtol=1e-4, atol=1e-12)
    unreached = [
        f"{module}.{parameter}[{expert}]"
        for module, (_, chosen) in given.items()
        for parameter in ("gate_up_proj", "down_proj")
        for expert in set(range(len(bundle.model.get_submodule(module).down_proj))) - set(chosen.flatten().tolist())
    ]
    assert sorted(named) == sorted(unreached) != []


@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=["wanda", "sparsegpt"])
def test_too_few_tokens_are_recorded(method):
    """Experts without tokens, and with fewer than inputs, are listed; the others are not."""
    bundle = load()
    listed = prune(bundle, method, one_token()).experts
    given = routing(bundle, one_token())
    assert set(listed["never_reached"]) <= set(fused(bundle))
    assert set(listed["under_calibrated"]) == set(fused(bundle)) - set(listed["never_reached"])
    for name, tokens in listed["under_calibrated"].items():
        module, _, expert = experts.EXPERT.fullmatch(name).groups()
        if ".0." in module:  # in the block below, the router has seen pruned ones
            assert tokens == int((given[module][1] == int(expert)).sum()) < bundle.layers[name].shape[1]
    assert prune(load(), method, random_windows(40)).experts == {}


def test_methods_without_statistics_say_nothing_of_tokens():
    """Magnitude looks at no token, so there is nothing to note."""
    from nmbench_plugins.magnitude import Magnitude

    assert prune(load(), Magnitude(), one_token()).experts == {}


# What is pruned


@families
@pytest.mark.parametrize("rule", ["wanda", "sparsegpt"])
def test_masks_equal_a_plain_implementation(family, rule):
    """Every expert is pruned as if it were a linear layer of its own that is given the tokens routed to it."""
    bundle, windows = load(family), random_windows(12)
    method = {"wanda": Wanda(), "sparsegpt": SparseGPT()}[rule]
    pruned = prune(bundle, method, windows)
    plain = one_shot.inputs(bundle.model, fused(bundle), windows)
    first = [name for name in fused(bundle) if bundle.layers[name].block == 0]
    assert first
    scale = 12  # of the reference: the number of windows, which the inputs of an expert no longer tell
    for name in first:
        x = plain[name].view(1, -1, plain[name].shape[1]) / scale**0.5
        mask, weight = getattr(one_shot, rule)(bundle.layers[name].read().clone(), x, 2, 4)
        assert (mask ^ pruned.masks[name]).float().mean() < 1e-3  # the order of tokens, and so rounding, differs
        if isinstance(method, Solver):
            torch.testing.assert_close(pruned.layers[name].weight[mask], weight[mask], rtol=1e-2, atol=1e-4)


@families
def test_written_experts_are_live(family):
    """Writing one expert changes that slice of the parameter alone, in the canonical view."""
    bundle = load(family)
    name = fused(bundle)[1]
    layer = bundle.layers[name]
    stored = bundle.model.get_parameter(layer.where.stored)
    before = stored.clone()
    new = torch.arange(float(layer.read().numel())).view(layer.shape)
    layer.write(new)
    assert torch.equal(stored[1], new)
    assert torch.equal(torch.cat([stored[:1], stored[2:]]), torch.cat([before[:1], before[2:]]))


@families
def test_pruned_experts_reload(family, tmp_path):
    """A pruned mixture, saved and loaded by transformers, gives the same logits."""
    from transformers import AutoModelForCausalLM

    bundle, windows = load(family), random_windows()
    apply(bundle, prune(bundle, Wanda(), windows))
    bundle.model.save_pretrained(tmp_path)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(input_ids=windows).logits
        assert torch.equal(again, bundle.model(input_ids=windows).logits)


def test_a_router_that_is_a_linear_layer_stays_dense():
    """A linear layer with an output for each of the experts beside it is skipped with that reason."""
    bundle = load()
    for block in bundle.model.model.layers:
        block.mlp.gate = nn.Linear(64, 4, bias=False)
    again = Bundle.of("it", bundle.model, None)
    assert again.layers.keys() == bundle.layers.keys()
    assert again.skipped["model.layers.0.mlp.gate.weight"] == "chooses among experts (4, 64)"


@pytest.mark.parametrize(
    ("glob", "left"),
    [("experts.*", 0), ("gate_up_proj", 8), ("gate_up_proj[1]", 14), ("model.layers.0.mlp.experts.down_proj[3]", 15)],
)
def test_experts_left_dense(glob, left):
    """A glob names all experts of a parameter, or one of them by its number."""
    bundle = load().without([glob])
    assert len(fused(bundle)) == left
    assert len(bundle.layers) == 8 + left


# Other layouts


class Transposed(nn.Module):
    """Fused experts `[experts, in, out]`, all of which are given all tokens in one batched product."""

    def __init__(self, says: bool = True) -> None:
        super().__init__()
        self.is_transposed = says
        self.up, self.down = (nn.Parameter(torch.randn(3, 8, 8)) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.flatten(0, 1).expand(3, -1, -1)
        return torch.bmm(torch.bmm(x, self.up).relu(), self.down).mean(dim=0).view(hidden.shape)


class Halves(nn.Module):
    """Fused experts whose rows take part in two products, and of which the second is never asked."""

    is_transposed = False

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 16, 8))

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.up[0][:8], self.up[0][8:]
        return hidden @ gate.T * (hidden @ up.T)


class Cast(nn.Module):
    """Fused experts that are copied before they are used."""

    is_transposed = False

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.up.double()[0].T.float()


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 8)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


@torch.no_grad()
def test_transposed_experts():
    """Experts stored `[in, out]` are layers in the canonical view, with the inputs of their batched products."""
    bundle = Bundle.of("toy", Stack(Transposed(), Transposed()), None)
    module, windows = bundle.model.blocks[0], random_windows()
    assert torch.equal(bundle.layers["blocks.0.up[2]"].read(), module.up[2].T)
    x = bundle.model.embedding(windows).flatten(0, 1)
    given = {"up": [x] * 3, "down": [(x @ module.up[e]).relu() for e in range(3)]}
    step = next(walk(bundle, windows, BOTH))
    assert list(step.stats) == [f"blocks.0.{p}[{e}]" for p in ("up", "down") for e in range(3)]
    for name, got in step.stats.items():
        inputs = given[name[9:-3]][int(name[-2])]
        assert got.tokens == int(inputs.any(dim=-1).sum())  # zeros stand for tokens that are not routed to the expert
        torch.testing.assert_close(got.gram, 2 / 6 * inputs.T @ inputs, rtol=1e-4, atol=1e-4)


def test_a_wrong_layout_is_noticed():
    """Experts that say they are stored one way and are used the other way are refused, square as they may be."""
    bundle = Bundle.of("toy", Stack(Transposed(says=False)), None)
    with pytest.raises(
        NMBenchError, match=r"experts of blocks\.0\.up \(3, 8, 8\) are not stored as \[experts, out, in\]"
    ):
        list(walk(bundle, random_windows(), BOTH))


@torch.no_grad()
def test_rows_in_several_products():
    """Inputs of products with other rows of an expert are counted once."""
    bundle, windows = Bundle.of("toy", Stack(Halves()), None).without(["up[1]"]), random_windows()
    step = next(walk(bundle, windows, BOTH))
    x = bundle.model.embedding(windows).flatten(0, 1)
    assert step.stats["blocks.0.up[0]"].tokens == len(x)
    torch.testing.assert_close(step.stats["blocks.0.up[0]"].gram, 2 / 6 * x.T @ x, rtol=1e-4, atol=1e-4)


def test_experts_without_tokens_and_without_a_routing():
    """Where tokens cannot be sent to an expert, it is an error with the remedy, never a silent substitute."""
    bundle = Bundle.of("toy", Stack(Halves()), None)
    with pytest.raises(
        NMBenchError, match=r"no calibration token reached .* of blocks\.0\.up, .* --skip 'blocks\.0\.up'"
    ):
        list(walk(bundle, random_windows(), BOTH))


def test_experts_that_cannot_be_heard():
    """Experts whose products cannot be seen are refused with the operation that hides them, not taken as unreached."""
    bundle = Bundle.of("toy", Stack(Cast()), None)
    with pytest.raises(NMBenchError, match=r"Cast does not show .* experts of blocks\.0\.up .*aten::_to_copy"):
        list(walk(bundle, random_windows(), BOTH))
    assert "forward" not in vars(bundle.model.blocks[0])


def test_what_needs_a_routing_is_refused_without():
    """First tokens of experts that are told of no routing cannot be left out, and there is no drift of their inputs."""
    bundle = Bundle.of("toy", Stack(Transposed()), None)
    with pytest.raises(NMBenchError, match="cannot skip the first of every window"):
        list(walk(bundle, random_windows(), BOTH, skip_tokens=1))
    with pytest.raises(NMBenchError, match="no counterpart in the dense model"):
        list(walk(bundle, random_windows(), BOTH | Stat.DRIFT))
    assert "forward" not in vars(bundle.model.blocks[0])


# Beside the dense model


@pytest.mark.parametrize(
    ("family", "way", "skip"),
    tiered(FAMILIES, WAYS, [3, 0], fast=lambda *case: case in (("mixtral", "eager", 0), ("qwen3moe", "grouped_mm", 3))),
)
@torch.no_grad()
def test_drift_and_first_tokens(family, way, skip):
    """An expert's inputs are compared with what it would be given in the dense model for the tokens routed to it in the
    partly pruned one; first tokens are left out of both.
    """
    bundle, dense, windows, sequential = load(family, way), load(family, way), random_windows(), skip == 0
    place = torch.arange(windows.numel()) % windows.shape[1] >= skip
    before = routing(dense, windows)
    for step in walk(bundle, windows, BOTH | Stat.DRIFT | Stat.LAG, sequential, skip):
        now = routing(bundle, windows)
        for name in (name for name in step.stats if bundle.layers[name].fused):
            module, parameter, expert = experts.EXPERT.fullmatch(name).groups()
            hidden, chosen = (tensor[place] for tensor in now[module])
            x, y = (
                experts.inputs(model.get_submodule(module), values, chosen, int(expert), parameter).double()
                for model, values in ((bundle.model, hidden), (dense.model, before[module][0][place]))
            )
            got, scale = step.stats[name], 1e-5 * float((2 / 6 * x.T @ x).abs().max())
            assert (got.tokens, got.lag) == (len(x), None)
            torch.testing.assert_close(got.gram.double(), 2 / 6 * x.T @ x, rtol=1e-4, atol=scale)
            torch.testing.assert_close(got.drift.double(), 2 / 6 * (y - x).T @ x, rtol=1e-3, atol=scale)
            assert bool((y - x).abs().max() > 1e-6) == (step.index > 0 or (sequential and len(x) > 0))
        for layer in step.layers:
            layer.write(torch.where(TWO_FOUR.top(layer.read().abs()), layer.read(), 0.0))


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("mixtral", Swaps()),
        ("qwen3moe", Swaps(sequential=False, skip_tokens=0)),
        pytest.param("qwen3moe", Swaps(), marks=pytest.mark.slow),
        pytest.param("mixtral", Swaps(sequential=False, skip_tokens=0), marks=pytest.mark.slow),
    ],
    ids=["mixtral-default", "qwen3moe-other", "qwen3moe-default", "mixtral-other"],
)
def test_swaps_refine_experts(family, method):
    """Swaps prune experts strictly with their default options, also those that no token reached."""
    for windows in (random_windows(), one_token()):
        pruned = prune(load(family), method, windows, Wanda())
        assert all((TWO_FOUR.kept(mask) == 2).all() for mask in pruned.masks.values())
    assert pruned.experts["never_reached"]


# Learners


def test_masks_of_experts_can_be_applied():
    """A learner can write masks of experts; what stands in for products is refused with the layer named."""
    from nmbench.pruning.learning import LiveWeights

    bundle = load()
    dense = DenseWeights(bundle)
    live = LiveWeights(bundle, {name: dense.layer(layer) for name, layer in bundle.layers.items()})
    masks = {name: TWO_FOUR.top(layer.read().abs()) for name, layer in bundle.layers.items()}
    live.apply(masks)
    for name, layer in bundle.layers.items():
        assert torch.equal(layer.read(), torch.where(masks[name], dense.layer(layer), 0.0))
    with pytest.raises(NMBenchError, match=r"layers\.0\.mlp\.experts\.gate_up_proj\[0\] is one of several experts"):
        live.provided(lambda name: live[name]).__enter__()
