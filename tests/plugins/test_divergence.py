"""Laws of KL divergence and top-1 agreement with the dense model, against a float64 reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.errors import NMBenchError, NumericalFailure
from nmbench.evaluation.subject import DenseSubject, Subject
from nmbench.models.bundle import Bundle
from nmbench.models.dense_view import DenseView
from nmbench.models.dense_weights import DenseWeights
from nmbench.pattern import Pattern
from nmbench_plugins import divergence as plugin
from nmbench_plugins.divergence import Kl, Top1, compared
from nmbench_plugins.tiny import BOS, TinyModel
from reference.dense import divergence

WINDOW, VOCABULARY = 16, 257
TEXT = torch.randint(256, (6 * WINDOW + 5,), generator=torch.Generator().manual_seed(1))
quick = settings(max_examples=15, deadline=None)


def pruned(family: str = "llama", keep: int = 2) -> tuple[Bundle, DenseView]:
    bundle = TinyModel().load(family)
    weights = DenseWeights(bundle)
    for layer in bundle.layers.values():
        layer.write(layer.read() * Pattern(keep, 4).top(layer.read().abs()))
    return bundle, DenseView(bundle, weights.copies)


def measured(bundle: Bundle, dense: DenseView, logit_bytes: int | None = None) -> tuple[dict, dict, Subject]:
    subject, reference = Subject(bundle, {"toy": TEXT}, logit_bytes=logit_bytes), DenseSubject({}, model=dense)
    argument = f"toy@{WINDOW}"
    found = [metric(argument).measure(subject, reference) for metric in (Kl, Top1)]
    return found[0][f"kl:{argument}"], found[1][f"top1:{argument}"], subject


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_both_are_their_definition(family):
    """KL in nats per token and agreement are those that float64 gives for two separate models."""
    kl, top1, _ = measured(*pruned(family))
    windows = TEXT[: 6 * WINDOW].view(6, WINDOW)
    expected = divergence(TinyModel().load(family).model, pruned(family)[0].model, windows)
    assert kl.value == pytest.approx(expected[0], rel=1e-4)
    assert top1.value == pytest.approx(expected[1], abs=1e-9)
    assert kl.value > 1e-4
    assert top1.value < 1


def test_the_dense_model_agrees_with_itself():
    """Of the dense model the divergence is exactly zero and the agreement exactly one, without spread."""
    bundle = TinyModel().load("llama")
    kl, top1, _ = measured(bundle, DenseView(bundle, DenseWeights(bundle).copies))
    assert (kl.value, kl.stderr, top1.value, top1.stderr) == (0, 0, 1, 0)


def test_fewer_weights_diverge_further():
    """1:4 is further from dense than 2:4, and that further than 3:4."""
    values = [measured(*pruned(keep=keep))[0].value for keep in (1, 2, 3)]
    assert values == sorted(values, reverse=True)


@pytest.fixture(scope="module")
def pair() -> tuple[Bundle, DenseView]:
    """A pruned model and the dense one; nobody changes them."""
    return pruned()


@quick
@given(st.integers(1, 7), st.integers(1, 20))
def test_sizes_of_parts_do_not_matter(pair, batch, part):
    """How many windows are run, and how many tokens compared, at once changes nothing but rounding."""
    whole = measured(*pair)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugin, "PART_BYTES", part * 4 * VOCABULARY)
        parts = measured(*pair, logit_bytes=batch * 4 * VOCABULARY * WINDOW)
    assert parts[0].value == pytest.approx(whole[0].value, rel=1e-5)
    assert parts[1].value == whole[1].value


@quick
@given(st.integers(0, 2**31), st.integers(2, 50), st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
def test_kl_of_any_logits(seed, vocabulary, scale):
    """KL is not negative, does not change when a constant is added to logits, and equals its float64 value."""
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(2, 3, vocabulary, generator=generator) * scale for _ in range(2))
    kl = compared(p, q)[:, 0]
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1)
    torch.testing.assert_close(kl, expected, rtol=1e-4, atol=1e-6 * max(1.0, scale))
    assert (kl > -1e-6).all()
    torch.testing.assert_close(compared(p + 3, q - 5)[:, 0], kl, rtol=1e-3, atol=1e-5 * max(1.0, scale))


def test_hand_made_distributions():
    """KL((1/2, 1/2) || (1/4, 3/4)) is log(2 / sqrt 3); equal argmax counts one."""
    p, q = torch.tensor([[[0.5, 0.5], [0.1, 0.9]]]).log(), torch.tensor([[[0.25, 0.75], [0.1, 0.9]]]).log()
    (found,) = compared(p[:, :1], q[:, :1])
    assert float(found[0]) == pytest.approx(math.log(2 / math.sqrt(3)), rel=1e-6)
    assert compared(p[:, 1:], q[:, 1:])[0].tolist() == [0, 1]


def test_bos_begins_the_windows_of_both_models():
    """With BOS both models read it before every window, and the positions compared are those without it."""
    bundle, view = pruned()
    dense = DenseSubject({}, model=view)
    begun = torch.cat([torch.full((6, 1), BOS), TEXT[: 6 * WINDOW].view(6, WINDOW)], dim=1)
    p, q = dense.logits(begun)[:, 1:], bundle.model(input_ids=begun).logits[:, 1:-1]
    subject = Subject(bundle, {"toy": TEXT})
    for metric, column in ((Kl, 0), (Top1, 1)):
        name = f"toy@{WINDOW}+bos"
        found = metric(name).measure(subject, dense)[f"{metric.word}:{name}"]
        assert found.value == pytest.approx(float(compared(p, q)[:, column].mean()), rel=1e-4)


def test_windows_make_the_standard_error():
    """Value, standard error and count follow from the figures of the windows, which are kept under the full name."""
    kl, top1, subject = measured(*pruned())
    for name, figures in ((f"kl:toy@{WINDOW}", kl), (f"top1:toy@{WINDOW}", top1)):
        values = subject.per_window[name]
        assert values.shape == (6,) and values.dtype == torch.float64
        assert figures.value == pytest.approx(float(values.mean()))
        assert figures.stderr == pytest.approx(float(values.std()) / math.sqrt(6))
        assert figures.n == 6
    assert (kl.lower_is_better, top1.lower_is_better) == (True, False)


def test_one_pass_serves_both(monkeypatch):
    """Both metrics together run the dense and the pruned model once each over every batch."""
    bundle, dense = pruned()
    passes = []
    bundle.model.register_forward_pre_hook(lambda module, args: passes.append(1))
    measured(bundle, dense)
    assert len(passes) == 2


def test_broken_logits_are_refused():
    """A NaN gives no number; text and window are named."""
    bundle, dense = pruned()
    bundle.model.get_input_embeddings().weight[int(TEXT[3 * WINDOW])] = torch.nan
    first = next(i for i in range(6) if int(TEXT[3 * WINDOW]) in TEXT[i * WINDOW : (i + 1) * WINDOW - 1])
    with pytest.raises(NumericalFailure, match=rf"toy@16 are NaN or infinite, first in window {first}\."):
        measured(bundle, dense)


@pytest.mark.parametrize("metric", [Kl, Top1])
@pytest.mark.parametrize("argument", ["", "demo", "@64", "demo@1", "demo@x"])
def test_text_and_window_are_demanded(metric, argument):
    """A divergence must say its text and its window."""
    with pytest.raises(NMBenchError, match=rf"'{metric.word}:{argument}' is not of the form {metric.word}:<data set>"):
        metric(argument)
