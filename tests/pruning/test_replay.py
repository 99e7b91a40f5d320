"""Laws of a captured update: replayed or not, the result, the losses and the counted tokens are the same."""

from __future__ import annotations

import torch

from nmbench.evaluation import Objective
from nmbench.pruning import replay as replay_module
from nmbench.pruning.replay import Replay
from nmbench.testing.cases import LearnCase
from reference.cuda_graphs import NOTES, refuse


class Recorded:
    """Stands in for a CUDA graph: a replay does the captured work on the same tensors, and counts nothing."""

    def __init__(self, work, live) -> None:
        self.work, self.live = work, live
        work()  # a trial

    def replay(self) -> None:
        with self.live.uncounted():
            self.work()


def losses_and_cost(monkeypatch, graph: bool):
    task = LearnCase().task()
    with task.gradients() as live:
        monkeypatch.setattr(replay_module, "graph_of", lambda work: Recorded(work, live))
        replay = Replay(live, Objective(0.5), lambda tokens: live.backward(tokens, Objective(0.5)), graph)
        assert not replay.due  # never on a CPU
        if graph:
            replay.capture(task.pool[:4])
        found = [replay(task.pool[first : first + size]).clone() for first, size in ((0, 4), (4, 4), (8, 3))]
        return found, task.settle(), task.notes


def test_a_replayed_update_is_the_update(monkeypatch):
    """Losses and tokens of captured minibatches, and of one with another shape, are those of plain calls."""
    plain, cost, _ = losses_and_cost(monkeypatch, graph=False)
    captured, captured_cost, notes = losses_and_cost(monkeypatch, graph=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(captured, plain, strict=True))
    assert captured_cost == cost
    assert notes == {}


def test_a_model_that_cannot_be_captured(monkeypatch):
    """It is updated by plain calls, and the record says why there is no graph."""
    monkeypatch.setattr(replay_module, "graph_of", refuse)
    task = LearnCase().task()
    with task.gradients() as live:
        replay = Replay(live, Objective(), lambda tokens: live.backward(tokens, Objective()))
        replay.capture(task.pool[:4])
        assert replay(task.pool[:4]).shape == (4,)
    assert task.notes == NOTES
