"""Laws of the relative output error of layers, against a float64 reference."""

import pytest
import torch

from nmbench.errors import NumericalFailure
from nmbench.evaluation.subject import DenseSubject, Subject
from nmbench.models.dense_view import DenseView
from nmbench.models.dense_weights import DenseWeights
from nmbench.pattern import Pattern
from nmbench_plugins.layererrors import LayerErrors
from nmbench_plugins.tiny import BOS, TinyModel
from reference.dense import layer_error

WINDOW = 16
TEXT = torch.randint(256, (6 * WINDOW + 5,), generator=torch.Generator().manual_seed(1))


def measured(change, family="llama", logit_bytes=None):
    """Figures of a model whose layers were changed by `change(name, weight)`; the bundle."""
    bundle = TinyModel().load(family)
    weights = DenseWeights(bundle)
    for name, layer in bundle.layers.items():
        layer.write(change(name, layer.read()))
    subject = Subject(bundle, {"toy": TEXT}, logit_bytes=logit_bytes)
    found = LayerErrors("toy@16").measure(subject, DenseSubject({}, model=DenseView(bundle, weights.copies)))
    return found["layers:toy@16"], found["layers:toy@16 worst"], bundle


def magnitude(name, weight):
    return weight * Pattern(2, 4).top(weight.abs())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gptneox"])
def test_every_error_is_its_definition(family):
    """The error of each layer is that of two separate models in float64, on the dense model's inputs."""
    mean, worst, bundle = measured(magnitude, family)
    dense, windows = TinyModel().load(family).model, TEXT[: 6 * WINDOW].view(6, WINDOW)
    expected = {name: layer_error(dense, bundle.model, name, windows) for name in bundle.layers}
    assert mean.detail == pytest.approx(expected, rel=1e-5)
    assert mean.value == pytest.approx(sum(expected.values()) / len(expected), rel=1e-5)
    assert mean.n == worst.n == len(bundle.layers)
    assert worst.value == max(mean.detail.values()) == mean.detail[worst.where]
    assert all(0.05 < error < 1 for error in expected.values())


def test_bos_is_read_before_every_window():
    """With BOS the inputs are those of windows that begin with it, and BOS is one of them."""
    bundle = TinyModel().load("llama")
    weights = DenseWeights(bundle)
    for name, layer in bundle.layers.items():
        layer.write(magnitude(name, layer.read()))
    subject = Subject(bundle, {"toy": TEXT})
    found = LayerErrors("toy@16+bos").measure(subject, DenseSubject({}, model=DenseView(bundle, weights.copies)))
    dense, windows = TinyModel().load("llama").model, TEXT[: 6 * WINDOW].view(6, WINDOW)
    begun = torch.cat([torch.full((6, 1), BOS), windows], dim=1)
    expected = {name: layer_error(dense, bundle.model, name, begun) for name in bundle.layers}
    assert found["layers:toy@16+bos"].detail == pytest.approx(expected, rel=1e-5)


def test_nothing_changed_is_no_error():
    """Dense weights have errors of exactly zero."""
    mean, worst, _ = measured(lambda name, weight: weight.clone())
    assert set(mean.detail.values()) == {0.0}
    assert worst.value == 0


@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_zero_and_twice_the_weight_are_errors_of_one(factor):
    """Without its weights a layer errs by all of its output; with twice the weights as well."""
    mean, _, _ = measured(lambda name, weight: weight * factor)
    assert mean.detail == pytest.approx(dict.fromkeys(mean.detail, 1.0), rel=1e-6)


def test_one_layer_is_not_blamed_for_another():
    """If a single layer is pruned, it alone has an error, whatever comes after it."""
    first = "model.layers.0.self_attn.v_proj"
    mean, worst, _ = measured(lambda name, weight: magnitude(name, weight) if name == first else weight.clone())
    assert [name for name, error in mean.detail.items() if error] == [first] == [worst.where]


def test_experts_of_one_parameter_are_left_out():
    """Fused experts are not modules with inputs to read; the layers beside them have their errors."""
    mean, _, bundle = measured(magnitude, "mixtral")
    assert set(mean.detail) == {name for name in bundle.layers if "self_attn" in name} < set(bundle.layers)
    assert mean.n == len(mean.detail)


def test_batches_do_not_matter():
    """How many windows are run at once changes nothing but rounding."""
    whole, _, _ = measured(magnitude)
    parts, _, _ = measured(magnitude, logit_bytes=2 * 4 * 257 * WINDOW)
    assert parts.detail == pytest.approx(whole.detail, rel=1e-6)


def test_broken_weights_are_refused():
    """A layer whose output is NaN is named."""
    broken = "model.layers.1.mlp.up_proj"
    with pytest.raises(NumericalFailure, match=f"output error of {broken} on toy@16 is NaN or infinite"):
        measured(lambda name, weight: weight * (torch.nan if name == broken else 1))
