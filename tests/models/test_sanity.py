"""Laws of what a loaded model must be: what is broken or sparse already is named."""

import pytest
import torch

from nmbench.errors import NMBenchError, NumericalFailure
from nmbench.models.bundle import Bundle
from nmbench.models.sanity import check_dense, check_finite, strictest
from nmbench.pattern import Pattern
from nmbench_plugins.tiny import FAMILIES, TinyModel
from reference.live import Live

LAYER = "model.layers.1.mlp.up_proj"


def load(family: str = "llama") -> Bundle:
    return TinyModel().load(family)


def prune(bundle: Bundle, names: list[str], pattern: Pattern) -> None:
    for name in names:
        layer = bundle.layers[name]
        layer.write(torch.where(pattern.top(layer.read().abs()), layer.read(), 0.0))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_sound_models_pass(family):
    """Random models of every family are finite and dense, and nothing is said of them."""
    bundle = load(family)
    check_finite(bundle)
    assert check_dense(bundle) == {}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]
)
def test_what_is_not_finite_is_named(name, value):
    """NaN and infinity are found in prunable layers and in everything else."""
    bundle = load()
    bundle.model.get_parameter(name).flatten()[3] = value
    with pytest.raises(NumericalFailure, match=name.removesuffix(".weight").replace(".", r"\.")):
        check_finite(bundle)


def rounded(bundle: Bundle, share: float) -> None:
    """Round the smallest weights of every layer to zero, as few bits do."""
    for layer in bundle.layers.values():
        weight = layer.read().clone()
        layer.write(torch.where(weight.abs() > weight.abs().float().quantile(share), weight, 0.0))


@pytest.mark.parametrize("share", [0.066, 0.15, 0.25])
def test_zeros_of_rounding_are_no_pruning(share):
    """Scattered zeros in every layer, as rounding to 4 bits leaves, pass and are said."""
    bundle = load()
    rounded(bundle, share)
    assert check_dense(bundle) == {"rounded_zeros": {"layers": 14, "share_of_zeros": pytest.approx(share, abs=0.01)}}


def test_the_origin_decides_on_many_scattered_zeros():
    """Of 40 % scattered zeros a model from few bits is believed to be dense; another one, or one of 55 %, is not."""
    bundle = load()
    rounded(bundle, 0.4)
    with pytest.raises(NMBenchError, match=r"14 of 14 layers .* with 40\.0% zeros; "):
        check_dense(bundle)
    bundle.provenance = {"dequantised_from": "model.gguf"}
    assert check_dense(bundle)["rounded_zeros"]["layers"] == 14
    rounded(bundle, 0.55)
    with pytest.raises(NMBenchError, match=r"14 of 14 layers .* with 55\.0% zeros; "):
        check_dense(bundle)


def test_the_origin_excuses_no_pattern():
    """A pruned model that was quantised later is pruned: rounding gives no strict pattern."""
    bundle = load()
    prune(bundle, list(bundle.layers), Pattern(3, 4))
    bundle.provenance = {"dequantised_from": "model.gguf"}
    with pytest.raises(NMBenchError, match=r"with 25\.0% zeros and strictly 3:4; "):
        check_dense(bundle)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), Pattern(8, 16)], ids=str)
def test_sparse_checkpoints_are_refused(pattern):
    """The error names the number of sparse layers, the first, its zeros and the pattern; the flag accepts it."""
    bundle = load()
    prune(bundle, list(bundle.layers), pattern)
    first = next(iter(bundle.layers)).replace(".", r"\.")
    zeros = f"{1 - pattern.density:.1%}"
    with pytest.raises(
        NMBenchError, match=rf"14 of 14 layers of tiny:llama are sparse already, first {first} with {zeros}"
    ):
        check_dense(bundle)
    found = check_dense(bundle, allowed=True)["already_sparse"]
    assert found == {"layers": 14, "share_of_zeros": pytest.approx(1 - pattern.density), "patterns": [str(pattern)]}


def test_one_sparse_layer_is_enough():
    """A single pruned layer is found, also one without a pattern."""
    bundle = load()
    layer = bundle.layers[LAYER]
    layer.read()[:, ::9] = 0.0
    with pytest.raises(
        NMBenchError, match=r"1 of 14 layers .* first model\.layers\.1\.mlp\.up_proj with 12\.5% zeros in whole "
    ):
        check_dense(bundle)


def test_skipped_layers_do_not_matter():
    """Layers left dense may be as sparse as they like."""
    bundle = load()
    prune(bundle, [LAYER], Pattern(2, 4))
    assert check_dense(bundle.without(["up_proj"])) == {}


def test_pattern_that_is_found():
    """It is the sparsest, then the finest, of the usual ones; none for weights without a pattern."""
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    assert strictest(weight) is None
    for pattern in (Pattern(1, 2), Pattern(2, 4), Pattern(2, 8), Pattern(16, 32), Pattern(3, 4)):
        assert strictest(torch.where(pattern.top(weight), weight, 0.0)) == pattern


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_broken_value_is_found_without_copies(name, value):
    """Checking a weight takes no memory for every value: an embedding is the largest tensor of many models."""
    bundle = TinyModel().load("llama")
    with Live(bundle.tensors().values()) as live:
        check_finite(bundle)
    assert live.peak < 100
    bundle.model.get_parameter(name).data[3, 5] = value
    with pytest.raises(NumericalFailure, match=name.removesuffix(".weight")):
        check_finite(bundle)
