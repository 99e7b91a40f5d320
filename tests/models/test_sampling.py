"""Laws of sampled continuations: the cache changes no token, and a draw has the probabilities of the softmax."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nmbench.models.sampling import cache_name, continued, drawn, nucleus
from nmbench.plugins.loading import load_plugins
from reference.tiers import tiered

PLUGINS = load_plugins()
FAMILIES = ["llama", "mistral", "gemma3", "gpt2", "gptneox", "opt", "qwen3moe"]


def tiny(family):
    return PLUGINS.lookup(PLUGINS.registries.models, "tiny")(dtype="float32").load(family).model


class Uncached(nn.Module):
    """A model whose forward pass has no argument for a cache."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids):
        return self.inner(input_ids=input_ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("family", "temperature"),
    tiered(FAMILIES, [0.0, 1.0], fast=lambda family, temperature: temperature == 1 or family == "llama"),
)
def test_a_cache_changes_no_token(family, temperature):
    """With the same random numbers a model draws the same tokens with its cache and without, and reads fewer.

    Windows are longer than the sliding windows of the tiny models.
    """
    model = tiny(family)
    prompts = torch.randint(256, (3, 5), generator=torch.Generator().manual_seed(1))
    found = []
    for one in (model, Uncached(model)):
        generator = torch.Generator().manual_seed(2)
        seen = []
        made = continued(one, prompts, 26, lambda logits, g=generator: drawn(logits, temperature, None, g), seen.append)
        assert seen == list(range(1, 22))
        found.append(made)
    cached, plain = found
    assert torch.equal(cached.windows, plain.windows)
    assert torch.equal(cached.windows[:, :5], prompts)
    assert torch.allclose(cached.last, plain.last, atol=1e-4)
    assert cached.forward_tokens == 3 * 25
    assert plain.forward_tokens == 3 * sum(range(5, 26))


def test_name_of_the_cache():
    """The cache is the argument that a forward pass has for it; without `use_cache` there is none."""
    assert cache_name(lambda input_ids, past_key_values=None, use_cache=None: None) == "past_key_values"
    assert cache_name(lambda input_ids, cache=None, use_cache=None: None) == "cache"
    assert cache_name(lambda input_ids, cache=None: None) is None
    assert cache_name(lambda input_ids, use_cache=None: None) is None


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, None), (0.5, None), (2.0, 0.8)])
def test_draws_have_the_probabilities_of_the_softmax(temperature, top_p):
    """The shares of many draws are those of softmax(logits / temperature), cut to the nucleus and scaled to 1."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])
    expected = (logits / temperature).softmax(0)
    if top_p is not None:
        expected = nucleus(expected[None], top_p)[0]
        expected = expected / expected.sum()
    count = 40_000
    found = drawn(logits.expand(count, -1), temperature, top_p, torch.Generator().manual_seed(0))
    shares = found.bincount(minlength=5) / count
    assert ((shares - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()


def test_temperature_zero_takes_the_largest():
    """At temperature 0 the likeliest token is taken, and no random number is used."""
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert torch.equal(drawn(logits, 0.0, None, generator), logits.argmax(1))
    assert torch.equal(generator.get_state(), before)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(any), st.floats(0.01, 1.0))
def test_nucleus_is_the_smallest_set(weights, top_p):
    """The likeliest tokens stay until their sum reaches the share; the others have no probability left."""
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    kept = nucleus(shares[None], top_p)[0]
    inside = kept > 0
    assert torch.equal(kept[inside], shares[inside])
    total, least = float(kept.sum()), float(kept[inside].min())
    assert total >= top_p - 1e-9
    assert total - least < top_p + 1e-9
    assert not (shares[~inside] > least).any()
