"""Laws of shared weights: what is pruned shares its memory with nothing else; what stays dense may."""

import pytest
import torch
from torch import nn

from nmbench.errors import NMBenchError
from nmbench.models.bundle import Bundle
from nmbench.models.sharing import check_shared


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 8)
        self.blocks = nn.ModuleList(blocks)


def bundle_of(*blocks: nn.Module) -> Bundle:
    return Bundle.of("toy", Stack(*blocks), None)


def test_a_block_in_two_places():
    """One block registered twice is refused, unless all of its layers stay dense."""
    shared = Block()
    bundle = bundle_of(shared, Block(), shared)
    with pytest.raises(NMBenchError, match=r"layers blocks\.0\.one and blocks\.2\.one share one weight.*--skip"):
        check_shared(bundle)
    check_shared(bundle.without(["blocks.0.*", "blocks.2.*"]))


def test_one_place_skipped_is_not_enough():
    """If only one of the two places is skipped, the other would prune it all the same, and is refused."""
    shared = Block()
    with pytest.raises(NMBenchError, match=r"layers blocks\.2\.one and blocks\.0\.one share one weight"):
        check_shared(bundle_of(shared, Block(), shared).without(["blocks.0.*"]))


def test_one_weight_in_two_modules():
    """Two layers that share one parameter are refused, both named, unless both stay dense."""
    first, second = Block(), Block()
    second.two.weight = first.one.weight
    bundle = bundle_of(first, second)
    with pytest.raises(NMBenchError, match=r"layers blocks\.0\.one and blocks\.1\.two share one weight"):
        check_shared(bundle)
    with pytest.raises(NMBenchError, match="share one weight"):
        check_shared(bundle.without(["blocks.0.one"]))
    check_shared(bundle.without(["blocks.0.one", "blocks.1.two"]))


def test_a_weight_tied_to_the_embedding():
    """A layer that shares its weight with the embedding cannot be pruned, and may stay dense."""
    block = Block()
    block.one.weight = nn.Parameter(torch.randn(64, 8))
    model = Stack(block)
    model.embedding.weight = block.one.weight
    bundle = Bundle.of("toy", model, None)
    with pytest.raises(NMBenchError, match=r"layers blocks\.0\.one and embedding share one weight"):
        check_shared(bundle)
    check_shared(bundle.without(["one"]))


def test_two_names_in_one_block():
    """One module under two names of its block is one layer, and shares with nothing else."""
    block = Block()
    block.again = block.one
    check_shared(bundle_of(block))
