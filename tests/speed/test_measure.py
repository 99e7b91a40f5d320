"""Laws of `nmbench speed` that need no GPU: timing, proof, conversion and report."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nmbench.errors import NMBenchError, NotStrict, NumericalFailure
from nmbench.pattern import Pattern
from nmbench.speed.gpu import half
from nmbench.speed.measure import check_pattern, shapes_of
from nmbench.speed.pruning import check_fits, prune
from nmbench.speed.report import Model, render
from nmbench.speed.times import Times, verdict
from nmbench_plugins.tiny import TinyModel
from reference.speed_hardware import TWO_FOUR, Fake, measured


def test_every_shape_is_timed_at_every_number_of_tokens():
    """The report has one product for each distinct shape and number of tokens, and counts all layers once."""
    bundle, hardware = TinyModel().load("llama"), Fake()
    shapes = {layer.shape for layer in bundle.layers.values()}
    found = measured(bundle, (1, 5), hardware)
    assert {(p.outputs, p.inputs, p.tokens) for p in found.products} == {(*s, t) for s in shapes for t in (1, 5)}
    assert sum(p.count for p in found.products if p.tokens == 1) == found.layers == found.converted == 14
    assert {p.speedup for p in found.products} == {2.0}
    assert all(p.sparse_bytes * 2 == p.dense_bytes == 4 * p.outputs * p.inputs for p in found.products)
    assert all((p.dense_kernels, p.sparse_kernels) == (["dense_kernel"], ["sparse_kernel"]) for p in found.products)
    assert all(p.relative_error == 0 for p in found.products)


def test_packed_products_stand_beside_the_bound_of_their_bytes():
    """Few tokens have a product with packed weights; its bytes bound its speed, vectors included."""
    found = measured(TinyModel().load("llama"), (1, 9), Fake())
    for product in found.products:
        assert (product.packed is not None) == (product.tokens == 1)
        weight = 4 * product.outputs * product.inputs
        vectors = 4 * (product.outputs + product.inputs)
        bound = (weight + vectors) / (weight * 9 // 16 + vectors)
        assert product.bytes_bound == (pytest.approx(bound) if product.tokens == 1 else None)
    plain = found.to_dict()["products"]
    assert {one["packed_speedup"] for one in plain} == {1.0, None}
    assert "bytes bound" in render(found)


def test_a_wrong_packed_product_is_refused():
    """A product with packed weights that is not the dense one ends the measurement."""
    with pytest.raises(NumericalFailure, match="differs from the dense one"):
        measured(TinyModel().load("llama"), (1,), Fake(spoil=1.0, refused={(64, 64), (32, 64), (96, 64), (64, 96)}))


@pytest.mark.parametrize(("release", "said"), [("0.8.0", True), ("0.8.1", False), (None, False)])
def test_a_slow_library_is_doubted(release, said):
    """cuSPARSELt 0.8.0 is slow on some GPUs: the report says so."""
    found = measured(TinyModel().load("llama"), (1,), Fake())
    text = render(dataclasses.replace(found, environment={**found.environment, "cusparselt": release}))
    assert ("cuSPARSELt 0.8.0" in text) == said


def test_the_whole_model_is_converted_in_place():
    """The whole-model figures are of a model whose layers are 2:4; they cover prefill and both batches of decoding."""
    bundle, hardware = TinyModel().load("llama"), Fake()
    found = measured(bundle, (1,), hardware)
    assert [(m.task, m.batch, m.tokens, m.launch) for m in found.models] == [
        ("prefill of 24", 1, 24, "eager"),
        ("prefill of 24", 1, 24, "graph"),
        ("decode", 1, 1, "eager"),
        ("decode", 1, 1, "graph"),
        ("decode", 3, 1, "eager"),
        ("decode", 3, 1, "graph"),
    ]
    for layer in bundle.layers.values():
        assert (TWO_FOUR.kept(layer.read() != 0) == 2).all()
    assert {m.sparse_bytes < m.dense_bytes for m in found.models} == {True}
    assert all(m.dense.n == (4 if (m.task, m.launch) == ("decode", "eager") else 10) for m in found.models)


def test_without_graphs_the_eager_figures_stand():
    """A step that cannot be recorded as a graph has an eager row alone."""
    found = measured(TinyModel().load("llama"), (1,), Fake(graphs=False))
    assert [(m.task, m.launch) for m in found.models] == [
        ("prefill of 24", "eager"),
        ("decode", "eager"),
        ("decode", "eager"),
    ]


def test_a_weight_that_cannot_be_converted_stays_dense():
    """A refused shape has dense times only, with the reason; its layers are not converted."""
    bundle = TinyModel().load("llama")
    before = bundle.layers["model.layers.0.mlp.up_proj"].read().clone()
    found = measured(bundle, (1,), Fake(refused={(96, 64)}))
    refused = next(p for p in found.products if (p.outputs, p.inputs) == (96, 64))
    assert (refused.sparse, refused.speedup, refused.problem) == (None, None, "that shape is refused")
    assert found.converted == 14 - refused.count
    assert torch.equal(bundle.layers["model.layers.0.mlp.up_proj"].read(), before)
    text = render(found)
    assert "not possible" in text
    assert text.count("96 x 64: that shape is refused") == 1
    assert "10 of 14 prunable layers sparse" in text


def test_other_linear_layers_stay_dense():
    """GPT-2's Conv1D, whose weight is stored `[in, out]`, is never converted, but its products are timed."""
    found = measured(TinyModel().load("gpt2"), (1,), Fake())
    assert found.converted == 0
    assert found.products


def test_a_wrong_product_is_refused():
    """A sparse product that differs from the dense product of the same pruned weight ends the measurement."""
    with pytest.raises(NumericalFailure, match=r"sparse product of model\.layers\.0\..* differs"):
        measured(TinyModel().load("llama"), (1,), Fake(spoil=0.1))


@pytest.mark.parametrize("text", ["2:4", "1:4", "2:8", "1:16"])
def test_patterns_that_fit(text):
    """Patterns that keep at most 2 of any 4 consecutive weights are accepted."""
    pattern = Pattern.parse(text)
    check_pattern(pattern)
    check_fits(prune(torch.randn(8, 32), pattern, "w"), "w")


@pytest.mark.parametrize("text", ["4:8", "3:4", "2:6", "1:2", "8:16"])
def test_patterns_that_do_not(text):
    """Other patterns are refused; the message names patterns that are accepted."""
    with pytest.raises(NMBenchError, match=r"sparse tensor cores multiply 2:4.*--pattern 2:4"):
        check_pattern(Pattern.parse(text))


@given(st.integers(0, 7), st.integers(0, 7), st.integers(0, 3))
def test_one_weight_too_many_is_found(row, group, column):
    """One non-zero too many is found and its group named; without that non-zero the weight passes."""
    weight = prune(torch.randn(8, 32, generator=torch.Generator().manual_seed(0)), TWO_FOUR, "w")
    fine = weight.clone()
    spare = (weight[row, 4 * group : 4 * group + 4] == 0).nonzero().flatten().tolist()
    weight[row, 4 * group + spare[column % 2]] = 1.0
    check_fits(fine, "w")
    with pytest.raises(
        NotStrict, match=rf"w is not 2:4: 1 of 64 .*row {row}, columns {4 * group}\.\.{4 * group + 3} keep 3"
    ):
        check_fits(weight, "w")


def test_slower_is_printed():
    """A speedup below 1 is printed with "slower"; wide quartiles add a question mark."""
    steady, unsteady = Times(1.0, 0.95, 1.05, 9), Times(1.0, 0.7, 1.3, 9)
    assert verdict(1.6, steady, steady) == "1.60 x"
    assert verdict(0.45, steady, steady) == "0.45 x, slower"
    assert verdict(1.6, steady, unsteady) == "1.60 x?"
    assert verdict(None) == "not possible"
    text = render(measured(TinyModel().load("llama"), (1,), Fake(ratio=2.0)))
    assert "0.50 x, slower" in text
    for piece in ("a fake", "float32", "fake: sparse_kernel", "dense: dense_kernel", "dense tokens/s", "decode"):
        assert piece in text


@given(st.lists(st.floats(1e-6, 10), min_size=2, max_size=30))
def test_times(seconds):
    """The median lies between the quartiles, and the quartiles lie within the measurements."""
    found = Times.of(seconds)
    assert min(seconds) <= found.low <= found.median <= found.high <= max(seconds)
    assert found.n == len(seconds)


def test_tokens_per_second():
    """A step reads `batch` x `tokens` tokens."""
    model = Model("decode", 16, 1, "eager", Times(0.5, 0.5, 0.5, 3), Times(0.25, 0.25, 0.25, 3), 1, 1)
    assert (model.tokens_per_second(model.dense), model.tokens_per_second(model.sparse), model.speedup) == (32, 64, 2)


def test_json_holds_every_figure():
    """The plain data survives JSON and has the ratios."""
    found = measured(TinyModel().load("llama"), (1,), Fake())
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert {p["speedup"] for p in content["products"]} == {2.0}
    assert content["models"][0]["dense_tokens_per_second"] == pytest.approx(
        24 / content["models"][0]["dense"]["median"]
    )
    names = {field.name for field in dataclasses.fields(found)}
    assert set(content) == names


def test_shapes_are_sorted_by_weight():
    """The shapes with the most weights come first."""
    shapes = shapes_of(TinyModel().load("llama"))
    sizes = [s.outputs * s.inputs * s.count for s in shapes]
    assert sizes == sorted(sizes, reverse=True)


def test_dtype():
    """Only half-precision dtypes are accepted; the default is bfloat16."""
    assert (half(None), half("float16")) == ("bfloat16", "float16")
    with pytest.raises(NMBenchError, match="--dtype float32 is not one"):
        half("float32")
