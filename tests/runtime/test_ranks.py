"""Laws of ranks: their shares, what they exchange, and that a learner shared by two learns what one would."""

from __future__ import annotations

import os

import pytest
import torch

import nmbench as nm
from nmbench.errors import NMBenchError
from nmbench.pruning.learning import LearnTask
from nmbench.runtime.ranks import ALONE, Launch, Ranks
from nmbench.runtime.ranks.buckets import buckets
from nmbench.runtime.ranks.watch import Watch, alive
from nmbench.testing.cases import LearnCase
from nmbench_plugins.distil import Distil
from nmbench_plugins.maskllm import MaskLLM
from nmbench_plugins.maskpro import MaskPro
from nmbench_plugins.maskpro.engines import StreamedEngine
from nmbench_plugins.maskpro.tracker import Rule
from nmbench_plugins.proxsparse import ProxSparse
from nmbench_plugins.soft import Soft
from reference.plain_kernels import PlainKernels
from reference.ranks import by_threads

PLACE = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
OFTEN = {"check_every": 5, "checkpoint_every": 3}
LEARNERS = [
    MaskPro(steps=30, minibatch=8, prior=0.3, tracker=0.9, **OFTEN),
    Soft(passes=4.0, minibatch=16, learning_rate=6e-2, **OFTEN),
    MaskLLM(passes=4.0, minibatch=16, learning_rate=2e-2, **OFTEN),
    ProxSparse(passes=4.0, minibatch=16, learning_rate=6e-2, trials=3, **OFTEN),
]


class Recording:
    """Stands for a CUDA graph: every replay calls the step on buffers of its own."""

    def __init__(self, call, tokens, references, state) -> None:
        self.call, self.tokens, self.references = call, tokens.clone(), references.clone()

    def replay(self, tokens, references) -> None:
        self.tokens.copy_(tokens)
        self.references.copy_(references)
        self.call(self.tokens, self.references)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 7, 10])
def test_parts_are_all_rows_in_order(size, count):
    """The parts of all ranks are the rows in their order, and differ by at most one row."""
    rows = torch.arange(count)
    parts = [Ranks(size, rank).part(rows) for rank in range(size)]
    assert torch.cat(parts).equal(rows)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_rank_without_a_window_is_refused():
    """A minibatch has a window for every rank."""
    with pytest.raises(NMBenchError, match="4 ranks cannot share a minibatch of 3 windows"):
        Ranks(4, 0).share(torch.zeros(3, 2))


def task_of(ranks: Ranks, **case) -> LearnTask:
    """A task that `ranks` share, on a model of its own."""
    task = LearnCase(**case).task()
    task.ranks = ranks
    return task


def learnt(method: nm.MaskLearner, ranks: Ranks) -> tuple[dict, LearnTask]:
    """Masks and task of one run."""
    task = task_of(ranks)
    return method.learn(task), task


@pytest.mark.parametrize("method", LEARNERS, ids=lambda method: type(method).__name__)
def test_ranks_learn_what_one_process_does(method):
    """Masks are equal on both ranks and to those of one process; tokens are those of one process; one rank saves."""
    assert method.data_parallel
    masks, alone = learnt(method, ALONE)
    found = by_threads(2, lambda ranks: learnt(method, ranks))
    for theirs, task in found:
        assert all(mask.equal(theirs[name]) for name, mask in masks.items())
        assert task.settle() == alone.settle()
    assert any(not mask.equal(alone.initial[name]) for name, mask in masks.items())
    assert [task.checkpoints.store.load() is None for _, task in found] == [False, True]


@pytest.mark.parametrize("graph", [None, Recording], ids=["called", "recorded"])
def test_the_streamed_engine_gathers_the_losses(graph):
    """Logits and figures after some steps are those of one process, be the pass of a rank a recorded graph or not."""

    def stepped(ranks):
        task = task_of(ranks)
        with torch.no_grad(), task.live_weights() as live:
            engine = StreamedEngine(task, live, Rule(3.0, 2.0, 0.99, True), PlainKernels(), record=graph)
            for step in range(4):
                tokens = task.pool[5 * step : 5 * step + 5]
                engine.advance(tokens, engine.references(tokens) if step == 0 else torch.full((5,), 2.0))
            return engine.to_save(), engine.losses(task.pool[:3]), task.settle()

    alone = stepped(ALONE)
    for state, losses, cost in by_threads(2, stepped):
        assert cost == alone[2] and losses.equal(alone[1])
        assert all(torch.as_tensor(value).equal(torch.as_tensor(alone[0][name])) for name, value in figures(state))


def figures(state):
    """The entries of a checkpoint that are numbers."""
    return [(name, value) for name, value in state.items() if not isinstance(value, str)]


def test_weights_are_trained_as_in_one_process():
    """Weights of a repair are the same bits on all ranks, and those of one process up to rounding, 1e-5."""
    method = Distil(passes=4.0, minibatch=8, check_every=8)

    def trained(ranks):
        task = LearnCase().weight_task()
        task.ranks = ranks
        return {name: pruned.weight for name, pruned in method.learn(task).items()}

    alone = trained(ALONE)
    one, two = by_threads(2, trained)
    for name, weight in alone.items():
        assert one[name].equal(two[name])
        torch.testing.assert_close(one[name], weight, rtol=1e-5, atol=1e-5)


def test_ranks_that_differ_are_found():
    """Different masks, or checkpoints, on two ranks end the row."""

    def differing(ranks):
        task = task_of(ranks)
        if ranks.rank:
            task.initial = {name: mask.roll(1, -1) for name, mask in task.initial.items()}
        task.check_same_checkpoint({"step": 3, "tensor": torch.zeros(ranks.rank)})
        task.check_same(task.initial)

    with pytest.raises(NMBenchError, match="ranks 0 and 1 hold different masks"):
        by_threads(2, differing)
    with pytest.raises(NMBenchError, match="hold different checkpoints: no checkpoin and"):
        by_threads(2, lambda ranks: task_of(ranks).check_same_checkpoint({"step": 3} if ranks.rank else None))


def test_the_place_among_processes():
    """The variables of torchrun; nothing for one process, and for variables that something else has set."""
    torchrun = {"TORCHELASTIC_RUN_ID": "none", **PLACE}
    assert Launch.of(torchrun) == Launch(3, 4, 1, 2)
    assert Launch.of({**torchrun, "WORLD_SIZE": "1", "RANK": "0"}) is None
    assert Launch.of(PLACE) is None
    assert Launch.of({}) is None


def test_gradients_travel_in_buckets():
    """Every tensor is in one bucket, in order; a bucket has one dtype, and at most so many bytes or one tensor."""
    sizes = [3, 1, 9, 2, 2, 1]
    tensors = [torch.zeros(size, dtype=torch.float64 if size == 1 else torch.float32) for size in sizes]
    found = list(buckets(tensors, most_bytes=16))
    assert [[len(tensor) for tensor in bucket] for bucket in found] == [[3], [1], [9], [2, 2], [1]]


def test_an_ended_process_is_seen():
    """A process that has ended is gone, be it waited for or not."""
    child = os.fork()
    if not child:
        os._exit(0)
    assert alive(os.getpid())
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert Watch({1: child, 2: os.getpid()}, leads=True).gone() == [1]
    os.waitpid(child, 0)
    assert not alive(child)
