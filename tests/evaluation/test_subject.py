"""Laws of evaluation: losses are cross-entropies of windows that never see each other, and perplexity is their exp."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmbench.errors import NMBenchError, NumericalFailure
from nmbench.evaluation.losses import window_losses
from nmbench.evaluation.measure import measure_all
from nmbench.evaluation.subject import DenseSubject, Subject
from nmbench.methods import Pruned, PrunedModel
from nmbench.models.applying import apply
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench_plugins.perplexity import Perplexity
from nmbench_plugins.tiny import BOS, TinyModel

VOCABULARY = 257
WINDOW = 16
quick = settings(max_examples=25, deadline=None)


def load(family: str = "llama") -> Bundle:
    return TinyModel().load(family)


@functools.cache
def shared() -> Bundle:
    """One bundle for tests that change nothing."""
    return load()


def text(length: int = 10 * WINDOW + 3, seed: int = 0) -> Tensor:
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed))


def losses(bundle: Bundle, tokens: Tensor, window: int = WINDOW, logit_bytes: int | None = None) -> Tensor:
    return Subject(bundle, {"toy": tokens}, logit_bytes=logit_bytes).losses("toy", window)


def perplexity(bundle: Bundle, tokens: Tensor, window: int = WINDOW) -> dict:
    metric = Perplexity(f"toy@{window}")
    return metric.measure(Subject(bundle, {"toy": tokens}), DenseSubject({}))[f"ppl:toy@{window}"].recorded()


def reference_losses(model: torch.nn.Module, windows: Tensor) -> Tensor:
    """Mean of -log softmax at the next token, in float64, one window and one token at a time."""
    means = []
    for window in windows:
        logits = model(input_ids=window[None]).logits[0].double()
        terms = [logits[i].exp().sum().log() - logits[i, window[i + 1]] for i in range(len(window) - 1)]
        means.append(torch.stack(terms).mean())
    return torch.stack(means)


# Losses


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_losses_are_their_definition(family):
    """The loss of a window is the mean of -log softmax over its window - 1 targets, as float64 gives it."""
    model, windows = load(family).model, text().view(-1)[: 6 * WINDOW].view(6, WINDOW)
    got = window_losses(model, windows)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), reference_losses(model, windows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [0, 0.1, 1, 2, 7])  # windows; one token at least
def test_float32_logits_come_in_parts(size):
    """The number of logits that exist in float32 at a time changes no bit of a loss."""
    model, windows = load().model, text()[: 7 * WINDOW].view(7, WINDOW)
    whole = window_losses(model, windows)
    parts = window_losses(model, windows, logit_bytes=int(4 * size * (WINDOW - 1) * VOCABULARY))
    assert torch.equal(parts, whole)


@quick
@given(st.integers(2, 40), st.integers(0, 200), st.integers(0, 2**31))
def test_bos_changes_the_context_alone(window, extra, seed):
    """With BOS every window has one token more in front, the same targets, and the losses that float64 gives."""
    tokens = text(window + extra, seed)
    subject = Subject(shared(), {"toy": tokens})
    plain, begun = subject.test_windows("toy", window), subject.test_windows("toy", window, bos=True)
    assert (begun[:, 0] == BOS).all()
    assert torch.equal(begun[:, 1:], plain)
    assert torch.equal(torch.cat(list(subject.batches("toy", window, bos=True))), begun)
    logits = subject.logits(begun, bos=True)  # of the targets, of which the first is the second token of the window
    assert logits.shape[1] == window - 1
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).double(), plain[:, 1:].flatten(), reduction="none"
    )
    got = subject.losses("toy", window, bos=True)
    torch.testing.assert_close(got, expected.view(len(plain), -1).mean(dim=1), rtol=1e-5, atol=1e-5)
    assert set(subject.cached) == {f"toy@{window}+bos"}


def test_bos_has_a_name_of_its_own():
    """Losses with BOS and without are measured and recorded apart, those of the dense model too."""
    metric = Perplexity(f"toy@{WINDOW}+bos")
    subject = Subject(shared(), {"toy": text()})
    found = metric.measure(subject, DenseSubject({}))[f"ppl:toy@{WINDOW}+bos"].value
    assert found == pytest.approx(math.exp(float(subject.losses("toy", WINDOW, bos=True).mean())))
    assert found != pytest.approx(math.exp(float(losses(shared(), text()).mean())), rel=1e-6)
    dense = DenseSubject(subject.cached)
    assert torch.equal(dense.losses("toy", WINDOW, bos=True), subject.losses("toy", WINDOW, bos=True))
    with pytest.raises(NMBenchError, match="was not measured on toy@16"):
        dense.losses("toy", WINDOW)


@quick
@given(st.integers(1, 12), st.integers(0, 2**31))
def test_batch_size_does_not_matter(batch, seed):
    """Perplexity and every loss are the same to rounding for any batch size."""
    tokens = text(seed=seed)
    some = losses(shared(), tokens, logit_bytes=batch * 4 * VOCABULARY * WINDOW)
    together = losses(shared(), tokens)
    torch.testing.assert_close(some, together, rtol=1e-6, atol=1e-6)


@quick
@given(st.integers(2, 40), st.integers(0, 200), st.integers(0, 2**31))
def test_windows_do_not_overlap_and_the_tail_is_dropped(window, extra, seed):
    """There are n // window losses, each that of its own window alone."""
    tokens = text(window + extra, seed)
    got = losses(shared(), tokens, window)
    assert len(got) == len(tokens) // window
    last = len(got) - 1
    alone = losses(shared(), tokens[last * window : (last + 1) * window], window)
    torch.testing.assert_close(got[last:], alone, rtol=1e-6, atol=1e-6)


def test_losses_are_measured_once():
    """A second metric on the same text and windows reads the cached losses."""
    bundle = load()
    subject = Subject(bundle, {"toy": text()})
    first = subject.losses("toy", WINDOW)
    bundle.model.get_output_embeddings().weight.zero_()
    assert subject.losses("toy", WINDOW) is first
    assert not torch.allclose(subject.losses("toy", WINDOW + 1)[:5], first[:5], atol=1e-4)


def test_progress_ends_at_its_total():
    """Progress counts batches up to their number."""
    reports = []
    three = 3 * 4 * VOCABULARY * WINDOW  # bytes of the logits of three windows
    subject = Subject(shared(), {"toy": text()}, lambda done, total: reports.append((done, total)), logit_bytes=three)
    subject.losses("toy", WINDOW)
    assert reports == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_evaluation_draws_nothing_and_changes_nothing():
    """Measuring leaves random state, gradients and weights as they were."""
    bundle = shared()
    before, digest = torch.get_rng_state(), bundle.digest()
    perplexity(bundle, text())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert bundle.digest() == digest


# Known perplexities


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_uniform_logits_give_the_vocabulary_size(family):
    """A model that finds all tokens equally likely has the vocabulary size as its perplexity, without any spread."""
    bundle = load(family)
    bundle.model.get_output_embeddings().weight.zero_()
    result = perplexity(bundle, text())
    assert result["value"] == pytest.approx(VOCABULARY, rel=1e-6)
    assert result["stderr"] == pytest.approx(0, abs=1e-4)


def test_perplexity_is_exp_of_the_mean_loss():
    """Perplexity, its standard error and its count follow from the losses of the windows."""
    values = losses(shared(), text()).tolist()
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    assert perplexity(shared(), text()) == {
        "value": pytest.approx(math.exp(mean)),
        "stderr": pytest.approx(math.exp(mean) * spread),
        "n": 10,
        "lower_is_better": True,
    }


def test_one_window_has_no_standard_error():
    """From one window nothing can be said of the spread."""
    assert perplexity(shared(), text(WINDOW))["stderr"] is None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_mask_that_keeps_everything_is_dense(family):
    """Under masks that are True everywhere the losses are, bit for bit, those of the dense model."""
    bundle = load(family)
    dense = losses(bundle, text())
    weights = DenseWeights(bundle)
    apply(bundle, PrunedModel({n: Pruned(torch.ones(la.shape, dtype=torch.bool)) for n, la in bundle.layers.items()}))
    assert bundle.digest() == weights.digest
    assert torch.equal(losses(bundle, text()), dense)


def test_mask_that_drops_everything_is_not_dense():
    """Under masks that are False everywhere the losses differ, so that the law above is not empty."""
    bundle = load()
    dense = losses(bundle, text())
    apply(bundle, PrunedModel({n: Pruned(torch.zeros(la.shape, dtype=torch.bool)) for n, la in bundle.layers.items()}))
    assert not torch.allclose(losses(bundle, text()), dense, atol=1e-4)


# What is refused


def test_broken_losses_are_refused():
    """A loss that is NaN gives no perplexity; the text and the first such window are named."""
    bundle, tokens = load(), text() % 200
    tokens[5 * WINDOW + 3] = 250
    bundle.model.get_input_embeddings().weight[250] = torch.nan
    with pytest.raises(NumericalFailure, match=r"loss on toy@16 is NaN or infinite, first in window 5\."):
        losses(bundle, tokens)
    assert losses(bundle, tokens[: 5 * WINDOW]).isfinite().all()


def test_infinite_losses_are_refused():
    """A loss that is infinite is refused like one that is NaN."""
    bundle = load()
    bundle.model.get_output_embeddings().weight.fill_(3e38)
    with pytest.raises(NumericalFailure, match="first in window 0"):
        losses(bundle, text())


def test_text_shorter_than_a_window_is_refused():
    """A text that fills no window is an error with both lengths."""
    with pytest.raises(NMBenchError, match="test text toy has 15 tokens, shorter than one window of 16"):
        losses(shared(), text(15))


def test_what_the_dense_model_was_not_measured_on():
    """A comparison with losses that the dense model does not have is an error, not a guess."""
    subject = DenseSubject({"toy@16": torch.ones(3)})
    assert len(subject.losses("toy", 16)) == 3
    with pytest.raises(NMBenchError, match="dense model was not measured on toy@32"):
        subject.losses("toy", 32)


@pytest.mark.parametrize("argument", ["", "demo", "demo@", "@256", "demo@1", "demo@0", "demo@-5", "demo@2.5", "demo@x"])
def test_perplexity_without_its_window_is_refused(argument):
    """A perplexity must name its text and a window of two tokens or more."""
    with pytest.raises(NMBenchError, match=rf"'ppl:{argument}' is not of the form ppl:<data set>@<window>"):
        Perplexity(argument)


@pytest.mark.parametrize(
    ("argument", "dataset", "window"),
    [("demo@256", "demo", 256), ("text:a@b.txt@2", "text:a@b.txt", 2), ("jsonl:c:/x@9@2048", "jsonl:c:/x@9", 2048)],
)
def test_the_window_stands_after_the_last_at(argument, dataset, window):
    """A data set's own name may hold an @; the last one parts it from the window."""
    metric = Perplexity(argument)
    assert (metric.dataset, metric.window, metric.datasets) == (dataset, window, (dataset,))


def test_all_metrics_by_full_name():
    """Every metric's values have names that hold their protocol."""
    metrics = {f"ppl:toy@{window}": Perplexity(f"toy@{window}") for window in (8, 16)}
    values = measure_all(metrics, Subject(shared(), {"toy": text()}), DenseSubject({}))
    assert {name: value["n"] for name, value in values.items()} == {"ppl:toy@8": 20, "ppl:toy@16": 10}
