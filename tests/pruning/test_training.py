"""Laws of gradients of the whole model: compiled, recomputed or plain, they are the same."""

from __future__ import annotations

import pytest
import torch

from nmbench import LearnTask, Pattern
from nmbench.evaluation import Objective
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.pruning import training as training_module
from nmbench.results.files import MemoryCheckpoints
from nmbench_plugins.tiny import TinyModel

OBJECTIVE = Objective(0.5)
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning", "ignore::DeprecationWarning")


def task_of_llama():
    """A task on the first block of a Llama: passes through one block are compiled in half the time."""
    model = TinyModel().load("llama").model
    model.model.layers = model.model.layers[:1]
    bundle = Bundle.of("it", model, None)
    patterns = dict.fromkeys(bundle.layers, Pattern(2, 4))
    initial = {name: Pattern(2, 4).top(layer.read().abs()) for name, layer in bundle.layers.items()}
    windows = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))
    return LearnTask(bundle, DenseWeights(bundle), patterns, initial, windows, windows, 0, MemoryCheckpoints(), "it")


def passed(prepare, objective=OBJECTIVE):
    """Losses, gradients by layer, cost and notes of one backward pass after `prepare(live, tokens)`."""
    task = task_of_llama()
    tokens = task.pool
    with task.gradients() as live:
        prepare(live, tokens)
        losses = live.backward(tokens, objective)
        gradients = {name: live.gradient(name).clone() for name in task.layers}
    return losses, gradients, task.settle(), task.notes


def same(found, expected):
    torch.testing.assert_close(found[0], expected[0])
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient)
    assert found[2] == expected[2]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_passes_are_those_of_the_model(backend):
    """Losses, gradients and counted tokens are those of plain passes, and the record says that they were compiled."""
    found = passed(lambda live, tokens: live.compile(tokens, OBJECTIVE, backend))
    same(found, passed(lambda live, tokens: None))
    assert found[3] == {"compiled": "yes"}


def refusing(graph, inputs):
    raise NotImplementedError("no such operation\nmore")


def wrong(graph, inputs):
    return lambda *args: [2 * value if value.is_floating_point() else value for value in graph(*args)]


@pytest.mark.parametrize(("backend", "reason"), [(refusing, "no such operation"), (wrong, "differ")])
def test_a_model_that_cannot_be_compiled_is_computed_as_before(backend, reason):
    """So it is with a compiler that gives up and with one that computes something else; the record says why."""
    found = passed(lambda live, tokens: live.compile(tokens, OBJECTIVE, backend))
    same(found, passed(lambda live, tokens: None))
    assert found[3]["compiled"].startswith("no: ") and reason in found[3]["compiled"]


def test_nothing_is_compiled_on_a_cpu():
    """Unless a backend is named."""
    assert passed(lambda live, tokens: live.compile(tokens, OBJECTIVE))[3] == {}


@pytest.mark.parametrize("compiled", [False, True])
def test_recomputed_blocks_have_the_same_gradients(monkeypatch, compiled):
    """Where activations do not fit, blocks run again in the backward pass, compiled or not."""
    expected = passed(lambda live, tokens: None)
    monkeypatch.setattr(training_module, "fits", lambda bundle, tokens: False)

    def prepare(live, tokens):
        if compiled:
            live.compile(tokens, OBJECTIVE, "eager")
        assert live._chosen_forwards(tokens)

    same(passed(prepare), expected)
