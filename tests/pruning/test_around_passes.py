"""Laws of what surrounds compiled passes: captured or not, an update is the same."""

from __future__ import annotations

import pytest
import torch

from nmbench.evaluation import Objective
from nmbench.pruning import replay as replay_module
from nmbench.testing.cases import LearnCase
from nmbench_plugins.soft.logits import Logits
from nmbench_plugins.soft.schedule import Setting
from nmbench_plugins.soft.steps import Steps
from reference.cuda_graphs import NOTES, refuse

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning", "ignore::DeprecationWarning")
KL = Objective(0.5)


class Recorded:
    """Stands in for a CUDA graph: a replay does the captured work on the tensors that the trial saw."""

    def __init__(self, work) -> None:
        self.replay = work
        work()  # a trial


def updated(device: str, backend: str, captured: bool):
    """Logits after three updates through compiled passes, the gradients before and after, and the notes."""
    task = LearnCase(device=device).task()
    tokens = task.pool[:4].to(device)
    with task.gradients() as live:
        live.compile(tokens, KL, backend)
        logits = Logits(task.pattern, task.initial, torch.device(device), 0.4, 0.02)
        steps = Steps(live, logits, KL, straight=False, seed=3, graph=captured and device == "cuda")
        assert steps.around.due == (captured and device == "cuda")
        if captured and device == "cpu":
            steps.settings.hold()
            steps.around.capture()
        places = []
        for step in range(3):
            steps.take(tokens.roll(step, 0), Setting(step, 0.5, 0.02, 1e-2))
            places.append([parameter.grad.data_ptr() for parameter in live.parameters.values()])
        assert (bool(steps.around.writing), bool(steps.around.learning)) == (captured, captured)
        return logits.values, places, task.notes


def same(device: str, backend: str) -> None:
    found, places, notes = updated(device, backend, captured=True)
    expected, _, _ = updated(device, backend, captured=False)
    for name, logits in expected.items():
        torch.testing.assert_close(found[name], logits, rtol=1e-4, atol=1e-6)
    assert places[0] == places[1] == places[2]  # where the graph reads them
    assert notes == {"compiled": "yes"}


def test_a_captured_update_around_compiled_passes(monkeypatch):
    """The logits after some updates are those of plain calls, and gradients stay where the graph reads them."""
    monkeypatch.setattr(replay_module, "graph_of", Recorded)
    same("cpu", "eager")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_captured_update_on_a_gpu():
    """So it is with a real graph."""
    same("cuda", "inductor")


def test_a_learner_that_cannot_be_captured(monkeypatch):
    """It is updated by plain calls, and the record says why there is no graph."""
    monkeypatch.setattr(replay_module, "graph_of", refuse)
    task = LearnCase().task()
    with task.gradients() as live:
        logits = Logits(task.pattern, task.initial, torch.device("cpu"), 0.4, 0.02)
        steps = Steps(live, logits, KL, straight=False, seed=3)
        steps.around.capture()
        assert steps.take(task.pool[:4], Setting(0, 0.5, 0.02, 1e-2)).shape == (4,)
    assert task.notes == NOTES
