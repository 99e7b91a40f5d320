"""Laws of a captured update of a block: replayed or not, results and counted tokens are the same."""

from __future__ import annotations

import pytest
import torch

from nmbench.methods import Pruned, PrunedModel
from nmbench.pattern import Pattern
from nmbench.pruning import part_replay as replay_module
from nmbench.pruning.block_errors import in_passes, relative_error, squared_errors
from nmbench.pruning.blocks import Blocks
from nmbench.pruning.part_replay import PartReplay
from nmbench_plugins.tiny import TinyModel

WINDOWS = torch.randint(256, (5, 16), generator=torch.Generator().manual_seed(0))  # batches of 2, 2 and 1


class Recorded:
    """Stands in for a CUDA graph: a replay does the captured work on the same tensors."""

    def __init__(self, work) -> None:
        self.replay = work
        work()  # a trial


def losses_and_tokens(capture: bool):
    """The losses of all batches of the first block, and the tokens that were counted."""
    bundle = TinyModel().load("llama")
    start = PrunedModel({name: Pruned(Pattern(2, 4).top(la.read().abs())) for name, la in bundle.layers.items()})
    found = []

    def learn(block):
        def update(part, number, target):
            weights = {name: weight.clone().requires_grad_() for name, weight in block.weights.items()}
            loss = squared_errors(part, number, target, weights).mean()
            found.append(float(loss.detach()))
            loss.backward()

        replay = PartReplay(block, [block.target(number, 0.5) for number in range(block.batches)], update)
        assert not replay.due  # never on a CPU
        if capture:
            replay.capture()
        del found[:]
        for number in range(block.batches):
            replay(number)
        return {}

    blocks = Blocks(bundle, start, dict.fromkeys(bundle.layers, Pattern(2, 4)), WINDOWS, 2)
    next(blocks.visit(learn))
    return found, blocks.cost()


def test_a_replayed_update_is_the_update(monkeypatch):
    """Losses and tokens of captured batches, and of one with another shape, are those of plain calls."""
    plain = losses_and_tokens(capture=False)
    monkeypatch.setattr(replay_module, "graph_of", Recorded)
    assert losses_and_tokens(capture=True) == plain


def test_a_block_that_cannot_be_captured(monkeypatch):
    """It is updated by plain calls."""

    def refuse(work):
        raise RuntimeError("operation not permitted when stream is capturing")

    plain = losses_and_tokens(capture=False)
    monkeypatch.setattr(replay_module, "graph_of", refuse)
    assert losses_and_tokens(capture=True) == plain


def test_the_relative_error_is_that_of_zeros():
    """Without errors it is 0; where all outputs were zero it would be 1."""

    class Part:
        module = torch.nn.Linear(2, 2)

        def outputs(self, number, tensors):
            return tensors["scale"] * targets[number]

    targets = [torch.randn(2, 3, 4), torch.randn(1, 3, 4)]
    errors = [relative_error(Part(), targets, {"scale": torch.tensor(scale)}) for scale in (1.0, 0.0, 0.5)]
    assert errors == pytest.approx([0.0, 1.0, 0.25])


def test_every_pass_reads_every_batch():
    """Batches come in random order, each once in a pass."""
    order = in_passes(5, torch.Generator().manual_seed(0))
    passes = [[next(order) for _ in range(5)] for _ in range(3)]
    assert all(sorted(one) == list(range(5)) for one in passes)
    assert len(set(map(tuple, passes))) == 3
