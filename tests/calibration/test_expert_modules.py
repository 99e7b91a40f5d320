"""Laws of experts that are modules of their own: one without tokens has the statistics of all tokens of its block."""

import pytest
import torch
from torch import Tensor, nn

from nmbench.calibration.walk import walk
from nmbench.errors import NMBenchError
from nmbench.methods import Stat
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.pattern import Pattern
from nmbench.pruning.one_shot import prune_one_shot
from nmbench_plugins.wanda import Wanda

WIDTH, EXPERTS, REACHED = 8, 4, 1
BOTH = Stat.INPUT_NORM | Stat.GRAM


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12, bias=False), nn.Linear(12, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Mixture(nn.Module):
    """A mixture that sends every token to one expert; `scale` changes what an expert is given."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList([Expert() for _ in range(EXPERTS)])
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[REACHED](self.scale * x.flatten(0, 1)).view(x.shape)


class Block(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.norm, self.moe = nn.LayerNorm(WIDTH), Mixture(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


class Model(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList([Block(scale) for _ in range(2)])

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return (x,)


def bundle_of(scale: float = 1.0) -> Bundle:
    torch.manual_seed(0)
    return Bundle.of("toy", Model(scale), None)


WINDOWS = torch.randint(64, (6, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("needs", [BOTH, BOTH | Stat.DRIFT])
def test_an_expert_without_tokens(sequential, needs):
    """Both layers of an unreached expert have the statistics of all tokens, as they go through that expert."""
    bundle = bundle_of()
    block = bundle.model.blocks[0]
    x = block.norm(bundle.model.embedding(WINDOWS)).flatten(0, 1)
    steps = [step for step in walk(bundle, WINDOWS, needs, sequential) if step.index == 0]
    stats = {name: found for step in steps for name, found in step.stats.items()}
    for index in range(EXPERTS):
        expert = block.moe.experts[index]
        for layer, inputs in (("up", x), ("down", expert.up(x).relu())):
            found = stats[f"blocks.0.moe.experts.{index}.{layer}"]
            assert found.tokens == len(x)
            torch.testing.assert_close(found.gram, 2 / len(WINDOWS) * inputs.T @ inputs)
            assert found.drift is None or not found.drift.any()
    others = {f"blocks.0.moe.experts.{i}.{layer}" for i in range(EXPERTS) if i != REACHED for layer in ("up", "down")}
    assert {name for step in steps for name in step.fallbacks} == others


def test_the_record_lists_them():
    """A row is made, and names the experts that no token reached; the router stays dense."""
    bundle = bundle_of()
    patterns = dict.fromkeys(bundle.layers, Pattern(2, 4))
    pruned = prune_one_shot(bundle, DenseWeights(bundle), Wanda(), patterns, WINDOWS, "it").pruned
    assert len(pruned.experts["never_reached"]) == 2 * 2 * (EXPERTS - 1)
    assert set(pruned.layers) == set(bundle.layers)
    assert not any("gate" in name for name in pruned.layers)


def test_experts_that_are_given_something_else():
    """Where experts are not given tokens of the mixture, nothing is guessed, and the row fails by name."""
    bundle = bundle_of(2.0)
    with pytest.raises(NMBenchError, match=r"no calibration token reached layer blocks\.0\.moe\.experts\.0\.up"):
        list(walk(bundle, WINDOWS, BOTH))
