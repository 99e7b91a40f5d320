"""Laws of weights stored in 8 bits: the model is, bit for bit, the float model with the numbers that they stand for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nmbench.errors import NMBenchError, NumericalFailure
from nmbench.experiment.memory import estimate, solving
from nmbench.methods import Pruned, PrunedModel, Stat
from nmbench.models.applying import apply
from nmbench.models.bundle import Bundle
from nmbench.models.dense_view import DenseView
from nmbench.models.dense_weights import DenseWeights
from nmbench.models.eight_bit import numbers, rounded
from nmbench.models.rounding import check_products, store_eight_bit, store_floats
from nmbench.pattern import Pattern
from nmbench.pruning.learning import LearnTask
from nmbench.pruning.one_shot import prune_one_shot
from nmbench.results.files import MemoryCheckpoints
from nmbench.verification.strict import check_strict
from nmbench_plugins.magnitude import Magnitude
from nmbench_plugins.maskpro import MaskPro
from nmbench_plugins.maskpro.engines import choice
from nmbench_plugins.swaps import Flips, Swaps, SwapsJudged
from nmbench_plugins.tiny import TinyModel
from nmbench_plugins.wanda import Wanda
from reference.plain_kernels import PlainKernels

TWO_FOUR = Pattern(2, 4)
TOKENS = torch.randint(256, (12, 24), generator=torch.Generator().manual_seed(0))
FEW = {"evidence_tokens": 96, "screen_tokens": 96, "confirm_tokens": 96, "window_tokens": 12, "margin": 0.0}


def loaded(family: str = "llama") -> Bundle:
    """A tiny model, with rows of zeros and of very different sizes."""
    bundle = TinyModel().load(family)
    for layer in bundle.layers.values():
        layer.read()[0] = 0.0
        layer.read()[1:9] *= 2.0 ** torch.arange(-8, 8, 2)[:, None]
    return bundle


def pair(family: str = "llama") -> tuple[Bundle, Bundle]:
    """A model in 8 bits, and the float model with the same numbers."""
    eight, floats = loaded(family), loaded(family)
    store_eight_bit(eight)
    for layer in floats.layers.values():
        layer.write(numbers(*rounded(layer.read())))
    return eight, floats


@torch.no_grad()
def logits(bundle: Bundle) -> Tensor:
    return bundle.model(input_ids=TOKENS).logits


def masks_of(bundle: Bundle) -> dict[str, Tensor]:
    return {name: TWO_FOUR.top(-layer.values().abs()) for name, layer in bundle.layers.items()}


def task_of(bundle: Bundle) -> LearnTask:
    """A task from the masks that keep the smallest weights."""
    patterns = dict.fromkeys(bundle.layers, TWO_FOUR)
    given = (bundle, DenseWeights(bundle), patterns, masks_of(bundle), TOKENS, TOKENS[:8].flip(1), 0)
    return LearnTask(*given, MemoryCheckpoints(), "acme")


def equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return all(torch.equal(mask, others[name]) for name, mask in some.items())


@given(
    st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.integers(-30, 12),
)
@settings(max_examples=60, deadline=None)
def test_rounding_is_to_the_nearest(seed, dtype, power):
    """A weight moves by half a step at most, the largest of a row is 127 steps, and zero stays zero."""
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2.0**power
    weight[2], weight[:, 3] = 0.0, 0.0
    weight = weight.to(dtype)
    values, scale = rounded(weight)
    step = scale.double()[:, None]
    assert values.dtype == torch.int8 and scale.dtype == dtype and int(values.abs().max()) <= 127
    assert ((values.double() * step - weight.double()).abs() <= 0.51 * step).all()
    assert not values[weight == 0].any()
    normal = weight.double().abs().amax(dim=1) / 127 > torch.finfo(dtype).tiny
    assert (values.abs().amax(dim=1)[normal] == 127).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_model_is_that_of_its_numbers(family):
    """Logits are those of the float model with the same numbers, in every dtype to evaluate in, and as floats again."""
    eight, floats = pair(family)
    assert all(layer.read().dtype == torch.int8 for layer in eight.layers.values())
    assert (eight.dtype, eight.shapes) == (floats.dtype, floats.shapes)
    assert eight.coverage() == floats.coverage()
    torch.testing.assert_close(logits(eight), logits(floats))  # Conv1D adds its bias in another order
    wide = (logits(bundle.in_dtype(torch.float64)) for bundle in (eight, floats))
    torch.testing.assert_close(*wide, rtol=1e-3, atol=1e-3)
    assert eight.in_dtype(torch.bfloat16).dtype == torch.bfloat16
    store_floats(eight.leaving(dict.fromkeys(list(eight.layers)[:1], "never called")))
    assert torch.equal(logits(eight), logits(floats))
    assert eight.digest() == floats.digest()


def test_masked_weights_stay_in_8_bits_and_come_back():
    """Pruned weights are int8 and strict, with the logits of pruned floats; the dense model is shown and restored."""
    eight, floats = pair()
    dense, before = DenseWeights(eight), logits(eight)
    masks = masks_of(eight)
    for bundle in (eight, floats):
        apply(bundle, PrunedModel({name: Pruned(mask) for name, mask in masks.items()}))
    weights = {name: layer.read() for name, layer in eight.layers.items()}
    assert all(weight.dtype == torch.int8 for weight in weights.values())
    check_strict(weights, masks, dict.fromkeys(weights, TWO_FOUR), "acme")
    assert torch.equal(logits(eight), logits(floats)) and not torch.equal(logits(eight), before)
    with DenseView(eight, dense.copies).shown():
        assert torch.equal(logits(eight), before)
    dense.restore()
    assert torch.equal(logits(eight), before)


@pytest.mark.parametrize("method", [Magnitude(), Wanda(), Swaps()], ids=lambda method: type(method).__name__)
def test_masks_are_those_of_the_numbers(method):
    """One-shot methods choose the masks that they choose on the float model with the same numbers."""
    found = []
    for bundle in pair():
        patterns = dict.fromkeys(bundle.layers, TWO_FOUR)
        init = Wanda() if isinstance(method, Swaps) else None
        dense = DenseWeights(bundle)
        found.append(prune_one_shot(bundle, dense, method, patterns, TOKENS, "acme", init=init).pruned.masks)
        dense.restore()
    assert equal(*found)


def test_blocks_in_8_bits_are_streamed():
    """Blocks that come to the device one by one compute the same logits, pass the proof, and get the same masks."""
    whole, streamed = loaded(), loaded()
    found = []
    for bundle in (whole, streamed):
        store_eight_bit(bundle)
        if bundle is streamed:
            bundle.stream(torch.device("cpu"))
        check_products(bundle, TOKENS[0])
        dense = DenseWeights(bundle)
        patterns = dict.fromkeys(bundle.layers, TWO_FOUR)
        found.append(prune_one_shot(bundle, dense, Wanda(), patterns, TOKENS, "acme").pruned.masks)
        dense.restore()
    assert equal(*found) and torch.equal(logits(whole), logits(streamed))


METHODS = (
    MaskPro(steps=4, check_every=2),
    Flips(steps=3, **FEW),
    SwapsJudged(rounds=1, aims="0/0, 0.3/0.3", sweeps=1),
)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_learners_decide_as_on_the_numbers(method):
    """Learners draw, measure and return what they do on the float model with the same numbers, and change no weight."""
    tasks = [task_of(bundle) for bundle in pair()]
    masks = [method.learn(task) for task in tasks]
    assert equal(*masks) and tasks[0].curve == tasks[1].curve and tasks[0].notes == tasks[1].notes
    assert tasks[0].bundle.digest() == DenseWeights(tasks[0].bundle).digest
    assert {layer.read().dtype for layer in tasks[0].bundle.layers.values()} == {torch.int8}


def test_the_streamed_engine_reads_8_bits(monkeypatch):
    """MaskPro's kernels get the numbers of one layer at a time, and decide as on floats."""
    monkeypatch.setattr(choice, "obstacle", lambda task, live: live.obstacle)
    monkeypatch.setattr(choice, "launch", PlainKernels())
    monkeypatch.setattr(choice, "record", None)
    tasks = [task_of(bundle) for bundle in pair()]
    masks = [MaskPro(steps=4, check_every=2).learn(task) for task in tasks]
    assert tasks[0].notes["engine"].startswith("streamed")
    assert equal(*masks) and tasks[0].curve == tasks[1].curve and tasks[0].notes == tasks[1].notes


def test_floats_are_not_written_into_8_bits():
    """Writing new weights, or floats in place, raises one line instead of cutting the fractions off."""
    eight, _ = pair()
    name, layer = next(iter(eight.layers.items()))
    with pytest.raises(NMBenchError, match=f"layer {name} is stored in 8 bits"):
        layer.write(layer.values())
    mask = masks_of(eight)[name]
    with pytest.raises(NMBenchError, match="new weights do not fit"):
        apply(eight, PrunedModel({n: Pruned(mask, layer.values() * mask) for n in eight.layers}))
    with task_of(eight).live_weights() as live, pytest.raises(NMBenchError, match="run without --weights"):
        live[name]


def test_only_plain_linear_layers_are_stored():
    """Fused experts, linear layers with more in them, and weights that are not finite are refused with their names."""
    with pytest.raises(NMBenchError, match="one of several experts in one parameter"):
        store_eight_bit(TinyModel().load("mixtral"))
    bundle = loaded()
    layer = next(iter(bundle.layers.values()))
    layer.module.__class__ = type("Adapted", (nn.Linear,), {})
    with pytest.raises(NMBenchError, match=f"layer {layer.name} of tiny:llama, a Adapted .* --skip 'q_proj'"):
        store_eight_bit(bundle)
    bundle = loaded()
    next(iter(bundle.layers.values())).read()[0, 0] = torch.inf
    with pytest.raises(NumericalFailure, match="NaN or infinite"):
        store_eight_bit(bundle)


@pytest.mark.parametrize("read", ["as it is", "as floats", "not at all"])
def test_a_weight_that_is_read_elsewhere_is_found(read):
    """A model whose code multiplies by a stored weight itself is refused; others pass."""
    bundle = loaded()
    store_eight_bit(bundle)
    layer = bundle.layers["model.layers.0.mlp.up_proj"].module
    if read == "as it is":
        layer.forward = lambda x: x @ layer.weight.t()
    if read == "as floats":
        layer.register_forward_hook(lambda module, args, output: output + module.weight.float().mean())
    if read == "not at all":
        return check_products(bundle, TOKENS[0])
    with pytest.raises(NMBenchError, match="--weights int8"):
        check_products(bundle, TOKENS[0])


def test_layers_that_are_left_dense_stay_floats():
    """A layer that no mask reaches keeps its dtype and its values."""
    bundle = loaded()
    some = bundle.without(["q_proj"])
    before = {name: layer.read().clone() for name, layer in bundle.layers.items() if name not in some.layers}
    assert store_eight_bit(some)["layers"] == len(some.layers) == len(bundle.layers) - len(before)
    assert equal(before, {name: layer.read() for name, layer in bundle.layers.items()})
    assert not any(bundle.layers[name].eight_bit for name in before)
    assert dataclasses.replace(bundle, layers=some.layers).dtype == torch.float32


def test_estimates_count_stored_bytes():
    """The estimated memory of a learner is that of copies in 8 bits, and the model's bytes are those it takes."""
    eight, floats = pair()
    count = sum(layer.read().numel() for layer in eight.layers.values())
    scales = sum(4 * layer.shape[0] for layer in eight.layers.values())
    learner = MaskPro(engine="torch")
    found = [estimate(it, Stat.NONE, 8, 32, "cpu", False, 4096, [learner]).learning[0] for it in (eight, floats)]
    assert [it.own for it in found] == [(4 + 1 + 4 + 1) * count, (4 + 4 + 4 + 1) * count]
    assert found[1].weights - found[0].weights == 3 * count - scales
    one, other = (next(iter(it.layers.values())) for it in (eight, floats))
    assert solving(one, Stat.NONE) == solving(other, Stat.NONE)  # a method is given a copy in floats
