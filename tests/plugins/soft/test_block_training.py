"""Laws of `scope=block`: the host's blocks, soft's arithmetic. The laws of all learners: test_conformance."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from nmbench.errors import NMBenchError
from nmbench.methods import Pruned, PrunedModel
from nmbench.models.dense_weights import DenseWeights
from nmbench.options import build
from nmbench.pattern import Pattern
from nmbench.pruning.blocks import Blocks
from nmbench.pruning.learning import LearnTask
from nmbench.results.files import FileCheckpoints, MemoryCheckpoints
from nmbench.testing import LearnCase
from nmbench_plugins.soft import Soft
from nmbench_plugins.soft.block_training import BlockSteps, learnt
from nmbench_plugins.soft.logits import Logits
from nmbench_plugins.soft.relaxation import as_rows, columns, soft_mask
from nmbench_plugins.soft.schedule import Schedule, Setting
from nmbench_plugins.tiny import TinyModel
from reference.tiers import tiered

WINDOWS = torch.randint(256, (8, 24), generator=torch.Generator().manual_seed(0))
POOL, SELECTION = WINDOWS[:4], WINDOWS[4:]
QUICK = Soft(scope="block", passes=5.0, minibatch=2, learning_rate=5e-3)
PLANTED = dataclasses.replace(QUICK, passes=10.0, minibatch=8)


def task_of(family: str, streamed: bool = False, pattern: str = "2:4", store=None) -> LearnTask:
    """A learning task on a tiny model, which starts from the smallest weights of every group."""
    bundle = TinyModel().load(family)
    if streamed:
        bundle.stream(torch.device("cpu"))
    patterns = dict.fromkeys(bundle.layers, Pattern.parse(pattern))
    start = {name: patterns[name].top(-layer.read().abs()) for name, layer in bundle.layers.items()}
    store = store or MemoryCheckpoints()
    return LearnTask(bundle, DenseWeights(bundle), patterns, start, POOL, SELECTION, 0, store, "it")


def blocks_of(bundle, seed: int = 0) -> Blocks:
    patterns = dict.fromkeys(bundle.layers, Pattern(2, 4))
    start = PrunedModel({name: Pruned(Pattern(2, 4).top(-la.read().abs())) for name, la in bundle.layers.items()})
    return Blocks(bundle, start, patterns, POOL, 2, True, seed)


@pytest.mark.parametrize("nothing", [{"tokens": 0}, {"passes": 0.0}])
def test_no_tokens_return_the_start(nothing):
    """With a budget of 0 the masks are those of the start, and nothing is computed."""
    task = LearnCase().task()
    masks = dataclasses.replace(PLANTED, **nothing).learn(task)
    assert all(mask.equal(task.initial[name]) for name, mask in masks.items())
    assert task.notes["returned"] == "initial"
    assert task.cost.backward_tokens == 0


@pytest.mark.parametrize(
    ("family", "learning_rate"),
    tiered(["llama", "gpt2", "mixtral"], [5e-3, 1e3], fast=lambda family, rate: family == "llama" or rate < 1),
)
def test_no_block_ends_with_a_higher_error(family, learning_rate):
    """The error of a block falls or stays; where it stays, as after a wild step size, so does the mask."""
    task = task_of(family)
    dataclasses.replace(QUICK, learning_rate=learning_rate).learn(task)
    assert [point["step"] for point in task.curve] == [1, 2]
    for point in task.curve:
        assert point["error_after"] <= point["error_before"]
        assert (point["changed"] > 0) == (point["error_after"] < point["error_before"])
    if learning_rate < 1:
        assert all(point["changed"] > 0 for point in task.curve)


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=pytest.mark.slow), "mixtral"])
def test_streamed_blocks_are_learnt_the_same(family):
    """With one block on the device at a time, masks, figures and cost are the same, and every block is on the host."""
    streamed, whole = task_of(family, streamed=True), task_of(family)
    before, short = streamed.bundle.digest(), dataclasses.replace(QUICK, passes=2.0)
    ours, theirs = short.learn(streamed), short.learn(whole)
    assert all(mask.equal(theirs[name]) for name, mask in ours.items())
    assert streamed.curve == whole.curve and streamed.settle() == whole.settle() and streamed.notes == whole.notes
    assert not streamed.bundle.streaming.present
    assert streamed.bundle.digest() == before


def test_later_blocks_see_the_masks_of_earlier_ones():
    """With the target on the dense path, the second block begins with a lower error than after an unlearnt first."""
    errors = []
    for first_steps in (10, 0):
        steps = [first_steps, 0]
        walk = blocks_of(TinyModel().load("llama")).visit(lambda block, s=steps: masked_weights(block, s[block.index]))
        figures = [block.figures for block, _ in walk]
        errors.append(figures[1]["error_before"])
    assert errors[0] < errors[1]


def masked_weights(block, steps: int):
    """The masked weights of a block after so many steps."""
    method = dataclasses.replace(QUICK, target=1.0)
    masks = learnt(block, method, Schedule(steps, method.noise, 5e-3, 0.1))
    return {name: block.dense[name].masked_fill(~mask, 0.0) for name, mask in masks.items()}


@functools.cache
def uninterrupted() -> tuple[LearnTask, dict[str, torch.Tensor]]:
    """The task of the planted model and the masks that are learnt for it when nobody interrupts."""
    task = LearnCase().task()
    return task, PLANTED.learn(task)


@pytest.mark.parametrize("event", [0, 20, 40, 41, 42, 65, 82])
def test_a_resumed_run_has_the_same_masks(tmp_path, event):
    """Killed inside a block or between two, a run ends with masks, curve, notes and tokens of one that was not."""
    whole, masks = uninterrupted()
    store = FileCheckpoints(tmp_path / "soft.safetensors", "the same job")
    killed = LearnCase().task(store)
    with killed.interrupted_at(event):
        PLANTED.learn(killed)
    resumed = LearnCase().task(store)
    again = PLANTED.learn(resumed)
    assert all(mask.equal(again[name]) for name, mask in masks.items())
    assert resumed.settle() == whole.settle()
    assert (resumed.notes, resumed.curve) == (whole.notes, whole.curve)


def test_finished_blocks_are_not_learnt_again(tmp_path):
    """After a kill behind the last block, only the whole model is measured again."""
    store = FileCheckpoints(tmp_path / "soft.safetensors", "the same job")
    PLANTED.learn(LearnCase().task(store))
    again = LearnCase().task(store)
    with again.interrupted_at(None) as events:
        PLANTED.learn(again)
    assert events[0] == 0


def test_cost_is_a_share_of_passes():
    """The backward tokens are those of all steps of all blocks, each as its share of the model."""
    task = task_of("llama")
    QUICK.learn(task)
    assert task.settle().backward_tokens == pytest.approx(5 * 4 * 24)
    assert task.cost.unique_tokens == 4 * 24
    assert task.cost.selection_tokens == 4 * 24


def test_worse_masks_are_never_returned():
    """Where whole-model losses on held-out windows rise, the start is returned, though block errors fell."""
    task = task_of("llama")
    loss = task.loss
    task.loss = lambda tokens: loss(tokens) + learnt_share(task)
    masks = QUICK.learn(task)
    assert task.notes["groups_changed_by_blocks"] > 0 and task.notes["groups_changed"] == 0
    assert task.notes["returned"] == "initial"
    assert all(mask.equal(task.initial[name]) for name, mask in masks.items())


def learnt_share(task) -> float:
    """The share of live weights that are kept and were not at the start."""
    new = [(la.read() != 0) & ~task.initial[name] for name, la in task.bundle.layers.items()]
    return 10 * float(torch.cat([one.flatten() for one in new]).float().mean())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_gradient_of_the_logits_is_that_of_autograd(family):
    """The first moment after one step is a tenth of the gradient by autograd through the block, written out plainly."""
    bundle = TinyModel().load(family)

    def learn(block):
        target = block.target(0, 0.5)
        logits = Logits(block.pattern, block.masks, bundle.device, 0.4, 0.02)
        leaves = {name: value.double().requires_grad_() for name, value in logits.values.items()}
        steps = BlockSteps(block, [target], logits, False, 3, 0.5)
        steps.take(0, Setting(0, 0.5, 0.02, 1e-3))
        fresh = Logits(block.pattern, block.masks, bundle.device, 0.4, 0.02)
        steps.relaxed.logits = fresh
        loss = plain_loss(block, target, steps.relaxed, leaves) / 0.5
        expected = torch.autograd.grad(loss, list(leaves.values()))
        for name, gradient in zip(leaves, expected, strict=True):
            assert gradient.norm() > 0
            assert (10 * logits.first[name] - gradient).norm() < 1e-3 * gradient.norm(), name
        return {}

    assert len(list(blocks_of(bundle).visit(learn))) == 2


def plain_loss(block, target, relaxed, leaves):
    """The relative error of a block under soft masks of `leaves`, with autograd through the masks."""
    stored = {}
    for number, (name, leaf) in enumerate(leaves.items()):
        rows = slice(0, len(leaf))
        noise = relaxed._drawn(number, name, rows) - columns(relaxed.logits.values[name] / relaxed.scales[1], 4)
        mask = as_rows(soft_mask(columns(leaf, 4) / relaxed.scales[1] + noise, relaxed.scales[0], 2), leaf.shape)
        weight = mask.float() * block.dense[name]
        layer = block.layers[name]
        stored[layer.where.stored.removeprefix(f"{block.name}.")] = weight.t() if layer.transposed else weight
    call = block.calls[0]
    output = functional_call(block.module, stored, call.args, call.kwargs)
    output = output if isinstance(output, torch.Tensor) else output[0]
    return F.mse_loss(output, target) / target.square().mean()


def test_a_planted_block_is_found():
    """From the worst masks, the first block of the planted model keeps the weight of every row that matters."""
    task = LearnCase().task()
    masks = dataclasses.replace(PLANTED, passes=20.0).learn(task)
    best = {name: task.pattern[name].top(weight.abs()) for name, weight in task.dense.items()}
    for name, mask in masks.items():
        largest = task.dense[name].abs().argmax(dim=1, keepdim=True)
        assert best[name].gather(1, largest).all()
        assert mask.gather(1, largest).all(), name
    assert all(point["error_after"] < 0.2 * point["error_before"] for point in task.curve)


@pytest.mark.parametrize("options", [{"scope": "layer"}, {"target": -0.1}, {"target": 1.5}])
def test_impossible_options_are_refused(options):
    """An impossible scope or target is one line."""
    with pytest.raises(NMBenchError, match=next(iter(options))):
        build(Soft, options, "soft")
