"""Laws of the door to the live weights: a product computed elsewhere stands in for a layer, which keeps its bias."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nmbench.evaluate import window_losses
from nmbench.learn import LiveWeights
from nmbench.models import Bundle, DenseWeights
from nmbench_plugins.tiny import TinyModel

families = pytest.mark.parametrize("family", ["llama", "gpt2"])
TOKENS = torch.arange(24).view(3, 8)


@functools.cache
def load(family: str) -> Bundle:
    bundle = TinyModel().load(family)
    for layer in bundle.layers.values():
        if getattr(layer.module, "bias", None) is not None:
            layer.module.bias.copy_(torch.linspace(-1, 1, len(layer.module.bias)))  # they start at 0
    return bundle


def live(bundle: Bundle) -> LiveWeights:
    dense = DenseWeights(bundle)
    return LiveWeights(bundle, {name: dense.layer(layer) for name, layer in bundle.layers.items()})


@families
def test_computed_products(family):
    """Products with the dense weights give the dense model; every layer is asked once, with its input."""
    bundle = load(family)
    wanted, digest, asked = window_losses(bundle.model, TOKENS), bundle.digest(), []
    door = live(bundle)

    def product(name: str, input: Tensor) -> Tensor:
        asked.append(name)
        assert input.shape == (*TOKENS.shape, bundle.layers[name].shape[1])
        return F.linear(input, door.original(name))

    with door.computed(product):
        torch.testing.assert_close(window_losses(bundle.model, TOKENS), wanted, rtol=1e-5, atol=1e-5)
        assert bundle.digest() == digest
    assert sorted(asked) == sorted(bundle.layers)
    assert torch.equal(window_losses(bundle.model, TOKENS), wanted)  # its own again


@families
def test_what_is_computed_counts(family):
    """What a layer returns is the product given, plus its bias."""
    bundle = load(family)
    layer = next(iter(bundle.layers.values()))
    rows, inputs = layer.shape
    bias = getattr(layer.module, "bias", None)
    with live(bundle).computed(lambda name, input: torch.full((*input.shape[:-1], rows), 2.0)):
        output = layer.module(torch.zeros(3, 5, inputs))
    assert torch.equal(output, (2.0 + (torch.zeros(rows) if bias is None else bias)).expand(3, 5, rows))
