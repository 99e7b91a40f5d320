"""Laws of the anatomy: what is prunable is found in the module tree, and a model source may know better."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from nmbench.calibration.walk import walk
from nmbench.errors import NMBenchError
from nmbench.methods import Stat
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.models.discovery import Anatomy, Weight, anatomy_of
from nmbench.pattern import Pattern
from nmbench.pruning.one_shot import prune_one_shot
from nmbench_plugins.sparsegpt import SparseGPT
from nmbench_plugins.tiny import TinyModel

BOTH = Stat.INPUT_NORM | Stat.GRAM


class Block(nn.Module):
    """x + two(relu(one(x)))."""

    def __init__(self, inner: int = 16) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, inner, bias=False), nn.Linear(inner, 8, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.two(self.one(hidden).relu())


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module, order: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 8)
        self.blocks = nn.ModuleList(blocks)
        self.order = range(len(blocks)) if order is None else order

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        hidden = self.embedding(input_ids)
        for index in self.order:
            hidden = self.blocks[index](hidden)
        return hidden


def bundle_of(*blocks: nn.Module, order: tuple[int, ...] | None = None, anatomy: Anatomy | None = None) -> Bundle:
    return Bundle.of("toy", Stack(*blocks, order=order), None, anatomy=anatomy)


def random_windows() -> Tensor:
    return torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(0))


# Names


@pytest.mark.parametrize(
    ("weight", "name", "stored"),
    [
        (Weight("a.b"), "a.b", "a.b.weight"),
        (Weight("a.b", "up", 3), "a.b.up[3]", "a.b.up"),
        (Weight("a.b", "up"), "a.b.up", "a.b.up"),
    ],
)
def test_names(weight, name, stored):
    """A layer is named by its module, or by its parameter and the number of the expert."""
    assert (weight.name, weight.stored) == (name, stored)


# Overridden by a model source


def test_an_anatomy_told_by_the_source():
    """A source may name other blocks and weights; nothing else is pruned, and names outside the blocks are refused."""
    anatomy = Anatomy(("blocks.1",), (Weight("blocks.1.two"),), {"blocks.0.one.weight": "because"})
    bundle = bundle_of(Block(), Block(), anatomy=anatomy)
    assert (list(bundle.blocks), list(bundle.layers)) == (["blocks.1"], ["blocks.1.two"])
    assert bundle.skipped == {"blocks.0.one.weight": "because"}
    with pytest.raises(NMBenchError, match=r"layer blocks\.0\.two of toy is in none of its decoder blocks"):
        bundle_of(Block(), Block(), anatomy=dataclasses.replace(anatomy, weights=(Weight("blocks.0.two"),)))


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_experts_of_a_layout_that_no_module_tells():
    """Experts whose number is not stated either stay dense; a model source that declares them makes them prunable."""
    import transformers

    size = {"hidden_size": 64, "intermediate_size": 96, "intermediate_size_mlp": 96, "vocab_size": 257}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = transformers.Llama4TextConfig(**size, **heads, num_local_experts=4, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    name = "model.layers.0.feed_forward.experts"
    model.get_submodule(name).num_experts = None
    found = anatomy_of(model, "it")
    assert found.skipped[f"{name}.down_proj"] == "not a linear layer but Llama4TextExperts (4, 96, 64)"
    parts = [(parameter, expert) for parameter in ("gate_up_proj", "down_proj") for expert in range(4)]
    more = tuple(Weight(name, parameter, expert, transposed=True) for parameter, expert in parts)
    told = dataclasses.replace(found, weights=(*found.weights, *more))
    bundle = Bundle.of("it", model, None, anatomy=told)
    assert bundle.layers[f"{name}.down_proj[1]"].shape == (64, 96)
    patterns = dict.fromkeys(bundle.layers, Pattern(2, 4))
    windows = torch.arange(48).view(2, 24)
    pruned = prune_one_shot(bundle, DenseWeights(bundle), SparseGPT(), patterns, windows, "it").pruned
    assert all((Pattern(2, 4).kept(mask) == 2).all() for mask in pruned.masks.values())
    wrong = dataclasses.replace(
        told, weights=(*found.weights, *(dataclasses.replace(w, transposed=False) for w in more))
    )
    with pytest.raises(NMBenchError, match=r"gate_up_proj \(4, 64, 192\) are not stored as \[experts, out, in\]"):
        list(walk(Bundle.of("it", model, None, anatomy=wrong), windows, BOTH))


# Odd trees


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_weights_are_skipped():
    """Layers of no inputs or no outputs are listed as such, and the others pruned."""
    bundle = bundle_of(Block(0), Block())
    assert list(bundle.layers) == ["blocks.1.one", "blocks.1.two"]
    assert bundle.skipped["blocks.0.one.weight"] == "has no weights (0, 8)"
    assert bundle.skipped["blocks.0.two.weight"] == "has no weights (8, 0)"
    assert len(list(walk(bundle, random_windows(), BOTH))) == 2


class Twice(nn.Module):
    """A layer that is used twice in one pass, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8, bias=False)
        self.again = self.one

    def forward(self, hidden: Tensor) -> Tensor:
        return self.again(self.one(hidden).relu())


@pytest.mark.parametrize("sequential", [False, True])
@torch.no_grad()
def test_a_layer_used_twice(sequential):
    """It is one layer, with the statistics of both uses; its other name is listed."""
    bundle, windows = bundle_of(Twice()), random_windows()
    assert list(bundle.layers) == ["blocks.0.one"]
    assert bundle.skipped["blocks.0.again.weight"] == "the same module as blocks.0.one (8, 8)"
    first = bundle.model.embedding(windows).flatten(0, 1)
    x = torch.cat([first, bundle.model.blocks[0].one(first).relu()])
    (step,) = walk(bundle, windows, BOTH | Stat.DRIFT, sequential)
    got = step.stats["blocks.0.one"]
    assert got.tokens == len(x)
    torch.testing.assert_close(got.gram, 2 / 4 * x.T @ x)
    assert not got.drift.any()


def test_tied_embeddings_are_no_obstacle():
    """Input and output embeddings that share a weight stay dense, both listed."""
    model = TinyModel().load("llama").model
    model.lm_head.weight = model.model.embed_tokens.weight
    bundle = Bundle.of("it", model, None)
    assert len(bundle.layers) == 14
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= bundle.skipped.keys()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(dtype):
    """Linear layers whose weights are not plain numbers are refused by name and dtype."""
    model = Stack(Block(), Block())
    model.blocks[1].two.weight = nn.Parameter(torch.zeros(8, 16).to(dtype), requires_grad=False)
    with pytest.raises(NMBenchError, match=rf"layer blocks\.1\.two of toy holds quantised weights \({dtype}\)"):
        Bundle.of("toy", model, None)


# Odd orders


@pytest.mark.parametrize(
    ("order", "what"),
    [
        ((0, 1, 0, 1), r"calls its block blocks\.0 more than once"),
        ((0, 0), r"calls its block blocks\.0 more than once"),
        ((1, 0), "does not call its blocks in order"),
        ((0,), "calls 1 of its 2 blocks"),
    ],
)
def test_blocks_in_another_order_are_refused(order, what):
    """A walk needs every block once, in order; all else is refused, never walked in part."""
    with pytest.raises(NMBenchError, match=f"toy {what}; it cannot be walked block by block"):
        list(walk(bundle_of(Block(), Block(), order=order), random_windows(), BOTH))


class Layered(nn.Module):
    """A model that passes several hidden states to its blocks at once."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 8)
        self.blocks = nn.ModuleList([Block()])

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        return self.blocks[0](self.embedding(input_ids).expand(2, -1, -1, -1))


@torch.no_grad()
def test_hidden_states_of_another_shape():
    """Blocks that are not given [windows, tokens, width] are walked as the model calls them."""
    bundle, windows = Bundle.of("toy", Layered(), None), random_windows()
    (step,) = walk(bundle, windows, BOTH | Stat.DRIFT | Stat.LAG)
    x = bundle.model.embedding(windows).flatten(0, 1).repeat(2, 1)
    assert step.stats["blocks.0.one"].tokens == len(x)
    torch.testing.assert_close(step.stats["blocks.0.one"].gram, 2 / 4 * x.T @ x)
