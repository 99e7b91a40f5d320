"""Laws of repairs in the host: streamed or not, in parts or whole, resumed or not, results and costs are the same."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from nmbench.errors import NMBenchError
from nmbench.evaluation import Objective
from nmbench.methods import BlockRepair, Pruned, PrunedModel
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.pattern import Pattern
from nmbench.pruning.block_parts import BlockTask
from nmbench.pruning.blocks import Blocks
from nmbench.pruning.confirming import unseen
from nmbench.pruning.one_shot import Made
from nmbench.pruning.repairing import BlockStore, repaired_blocks, repaired_layers
from nmbench.results.files import MemoryCheckpoints
from nmbench.testing import LearnCase
from nmbench_plugins.tiny import TinyModel
from reference.repairs import Nearer, Rescale

WINDOWS = torch.randint(256, (6, 24), generator=torch.Generator().manual_seed(0))


def load(family: str, streamed: bool = False) -> Bundle:
    bundle = TinyModel().load(family)
    if streamed:
        bundle.stream(torch.device("cpu"))
    return bundle


def patterns(bundle: Bundle) -> dict[str, Pattern]:
    return dict.fromkeys(bundle.layers, Pattern(2, 4))


def start_of(bundle: Bundle) -> PrunedModel:
    return PrunedModel({name: Pruned(Pattern(2, 4).top(layer.read().abs())) for name, layer in bundle.layers.items()})


class Stores:
    """The checkpoints of all blocks in memory; saving block `stop` raises KeyboardInterrupt afterwards."""

    def __init__(self, stop: int | None = None) -> None:
        self.stores: dict[int, MemoryCheckpoints] = {}
        self.stop = stop

    def __call__(self, index: int):
        store = self.stores.setdefault(index, MemoryCheckpoints())
        return Stopping(store) if index == self.stop else store


class Stopping:
    def __init__(self, store: MemoryCheckpoints) -> None:
        self.store, self.load = store, store.load

    def save(self, state) -> None:
        self.store.save(state)
        raise KeyboardInterrupt


def by_blocks(bundle: Bundle, method: Nearer, stores: Stores | None = None) -> Made:
    blocks = Blocks(bundle, start_of(bundle), patterns(bundle), WINDOWS, method.minibatch, method.dense_path)
    return repaired_blocks(blocks, method, "it", BlockStore(stores or Stores()))


def weights(made: Made) -> Mapping[str, Tensor]:
    return {name: pruned.weight for name, pruned in made.pruned.layers.items()}


def assert_same(ours: Made, theirs: Made) -> None:
    assert list(weights(ours)) == list(weights(theirs))
    assert all(torch.equal(weights(ours)[name], weight) for name, weight in weights(theirs).items())
    assert ours.cost == theirs.cost
    assert ours.pruned.curve == theirs.pruned.curve


@pytest.mark.parametrize("scope", ["block", "layer"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_streamed_blocks_are_repaired_the_same(family, scope):
    """With one block on the device, passes waiting on the host or not, a block repair is the same, bit for bit."""
    method = Nearer(steps=2, minibatch=3, scope=scope)
    whole = by_blocks(load(family), method)
    for room in (0, 2**40):
        streamed = load(family, streamed=True)
        streamed.streaming.room = room
        assert_same(by_blocks(streamed, method), whole)
        assert not streamed.streaming.present


def test_streamed_layers_are_repaired_the_same():
    """With one block on the device at a time, a layer repair has the same weights and cost, bit for bit."""
    results = []
    for streamed in (True, False):
        bundle = load("llama", streamed)
        arguments = (Rescale(), patterns(bundle), WINDOWS, "it", start_of(bundle))
        results.append(repaired_layers(bundle, DenseWeights(bundle), *arguments))
    assert_same(*results)


def test_an_interrupted_repair_goes_on_with_the_next_block():
    """Interrupted after any block, a block repair ends with the weights, figures and cost of one that was not."""
    method = Nearer(steps=2, minibatch=3)
    whole = by_blocks(load("llama"), method)
    for stop in range(2):
        stores = Stores(stop)
        with pytest.raises(KeyboardInterrupt):
            by_blocks(load("llama"), method, stores)
        stores.stop = None
        assert_same(by_blocks(load("llama"), method, stores), whole)


def test_the_model_is_dense_again():
    """A walk of repairs leaves the dense weights, also after an exception."""
    bundle = load("llama")
    before = bundle.digest()
    by_blocks(bundle, Nearer(steps=1))
    assert bundle.digest() == before
    with pytest.raises(KeyboardInterrupt):
        by_blocks(bundle, Nearer(steps=1), Stores(1))
    assert bundle.digest() == before


def test_the_dense_path_is_counted_once():
    """Passes on the dense path count, whether the method computes the dense outputs or the host does."""

    class Idle(Nearer):
        """Repairs nothing."""

        def repair_block(self, block):
            return {}

    bundle = load("llama")
    passes = by_blocks(bundle, Idle()).cost.forward_tokens / WINDOWS.numel()
    assert passes == pytest.approx(2 * 1 / 2)  # on both paths through the first of two equal blocks


def test_gradients_do_not_outlive_the_training():
    """After the training of a weight learner no parameter has a gradient, and the weights are dense again."""
    task = LearnCase().weight_task()
    before = task.bundle.digest()
    with task.training() as live:
        live.backward(task.pool[:4], Objective())
        assert all(parameter.grad is not None for parameter in live.parameters.values())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in task.model.parameters())
    assert task.bundle.digest() == before


@pytest.mark.parametrize(("count", "half"), [(4, 2), (5, 3), (16, 8)])
def test_unseen_windows(count, half):
    """The second half of the selection windows confirms a repair; fewer than two are refused."""
    windows = torch.arange(count)[:, None]
    assert torch.equal(unseen(windows, "it"), windows[-half:])
    with pytest.raises(NMBenchError, match="it needs at least 4 selection windows"):
        unseen(windows[:3], "it")


class Noting(BlockRepair):
    """Changes nothing, and notes the outputs of every block; `scribbles`: writes into the live block beforehand."""

    scribbles = False

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "seen", [])

    def repair_block(self, block: BlockTask) -> Mapping[str, Tensor]:
        self.seen.append(block.outputs(0))
        if self.scribbles:
            block.write({name: torch.zeros_like(weight) for name, weight in block.weights.items()})
        return {}


class Scribbling(Noting):
    scribbles = True


def test_weights_that_are_written_but_not_returned_are_forgotten():
    """Later blocks see what a repair returned, not what it left in the live block."""
    plain, scribbling = Noting(), Scribbling()
    for method in (plain, scribbling):
        assert not by_blocks(load("llama"), method).pruned.weights_changed
    assert len(plain.seen) > 1
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(plain.seen, scribbling.seen, strict=True))
