"""Laws of the checks of the dense model: one that predicts its text is believed, one that does not is said."""

import math

import pytest
import torch
from torch import nn

from nmbench.evaluation.subject import Subject
from nmbench.experiment.dense_checks import better_than_dense, dense_doubts, shuffled, unigram_loss
from nmbench_plugins.demo import DemoModel, DemoPlays
from nmbench_plugins.tiny import TinyModel


def measured(bundle, tokens, window=64):
    """A subject whose losses on the text `a` have been measured."""
    subject = Subject(bundle, {"a": tokens})
    subject.losses("a", window)
    return subject


@pytest.fixture(scope="module")
def demo():
    return DemoModel().load("")


@pytest.fixture(scope="module")
def tokens(demo):
    text = next(iter(DemoPlays().texts("test")))[4000:12000]
    return torch.tensor(demo.tokenizer(text)["input_ids"])


def test_a_sound_model_is_believed(demo, tokens):
    """The demo predicts a play, whole and in a single window."""
    assert dense_doubts(measured(demo, tokens)) == {}
    assert dense_doubts(measured(demo, tokens[:64])) == {}


def test_wrong_tokens_are_doubted(demo, tokens):
    """Under a tokenizer with other ids the demo predicts nothing: both reasons are said, and the text."""
    other = torch.randperm(4096, generator=torch.Generator().manual_seed(0))[tokens]
    doubt = dense_doubts(measured(demo, other))["a@64"]
    assert doubt.subject == "dense model"
    for words in ("does not predict a@64", "of token frequencies alone", "rows are not ranked by a@64"):
        assert words in doubt.text


def test_a_model_without_context_is_doubted(demo, tokens, monkeypatch):
    """A model whose attention is lost knows the last token at most: no better on a text in order than shuffled."""
    bundle = TinyModel().load("llama")
    text = (tokens % 256)[: 64 * 8]
    counts = torch.bincount(text, minlength=257).float() + 0.1

    class Frequencies(nn.Module):
        def forward(self, input_ids, use_cache=False):
            logits = (counts * 1.0).log().expand(*input_ids.shape, -1)
            return type("Output", (), {"logits": logits})()

    monkeypatch.setattr(bundle, "model", Frequencies())
    monkeypatch.setattr(type(bundle), "device", torch.device("cpu"))
    monkeypatch.setattr("nmbench.evaluation.subject.batch_size", lambda *_: 4)
    doubt = dense_doubts(measured(bundle, text))["a@64"]
    assert "of the same tokens shuffled" in doubt.text


def test_random_models_are_doubted(tokens):
    """A random model is worse than token frequencies."""
    bundle = TinyModel().load("llama")
    assert list(dense_doubts(measured(bundle, tokens % 256))) == ["a@64"]


def test_unigram_loss():
    """Each token is predicted by the others: of two different ones nothing is known; a constant text is nearly free."""
    assert unigram_loss(torch.tensor([5]), 10) == pytest.approx(math.log(10))
    assert unigram_loss(torch.tensor([[3, 8]]), 10) == pytest.approx(math.log(2 * 9))  # half for new, of nine
    assert unigram_loss(torch.full((4, 250), 7), 10) == pytest.approx(0, abs=2e-3)
    text = torch.randint(100, (8, 5000), generator=torch.Generator().manual_seed(0))
    for vocabulary in (100, 100_000):  # what never occurs costs nothing in a long text
        assert unigram_loss(text, vocabulary) == pytest.approx(math.log(100), abs=0.01)


def test_shuffled_windows():
    """The same tokens in another order, the same at every call; the first stays where it is."""
    windows = torch.arange(48).reshape(2, 24)
    found = shuffled(windows)
    assert torch.equal(found, shuffled(windows))
    assert torch.equal(found.sort(dim=1).values, windows)
    assert torch.equal(found[:, 0], windows[:, 0])
    assert not torch.equal(found, windows)


@pytest.mark.parametrize(
    ("low", "high", "windows", "said"), [(-0.2, -0.1, 9, 1), (-0.2, 0.1, 9, 0), (0.1, 0.2, 9, 0), (-0.2, -0.1, 1, 0)]
)
def test_better_than_dense(low, high, windows, said):
    """A row is doubted if its interval lies below zero, never of one window; likely reasons are said."""
    found = better_than_dense({"a@64": {"mean": (low + high) / 2, "low": low, "high": high, "windows": windows}})
    assert len(found) == said
    for doubt in found:
        assert str(doubt).startswith("better than dense: distrust: a@64 -0.1500 nats per token [-0.2000, -0.1000]")
        assert all(word in doubt.text for word in ("calibration", "tokens", "BOS"))
