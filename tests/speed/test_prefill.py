"""Laws of the profiled prefill, of merged products and of products in other forms, on a fake device."""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers

from nmbench.errors import NMBenchError
from nmbench.models.bundle import Bundle
from nmbench.runtime.sparse24.forms import CUSPARSELT, DENSE, FORMS, FP8, FP8_CUTLASS, SEARCHED, TORCH
from nmbench.runtime.sparse24.quantise import by_torch
from nmbench.speed.measure import convert_merged
from nmbench.speed.prefill import DENSE_WAYS, SPARSE_WAYS
from nmbench.speed.prefill_report import Prefill, prefill_row
from nmbench.speed.pruning import most_error
from nmbench.speed.report import render
from nmbench.speed.times import Times
from nmbench_plugins.tiny import TinyModel
from reference.speed_hardware import TWO_FOUR, Fake, measured

# down_proj has 96 inputs, which sparse FP8 forms do not multiply
GROUPS = 2 * 3  # blocks x (q, k, v; o; gate, up)
LAYERS = 2 * 6


def refusing(weight, bias):
    raise RuntimeError("no such kernel\non this device")


def rounding(weight, bias):
    """A product of inputs and weights that are rounded to FP8."""
    rows, scale = by_torch(weight)

    def product(inputs):
        own, scales = by_torch(inputs)
        return F.linear(own.float() * scales, rows.float() * scale, bias)

    return product


def exchanging(weight, bias):
    return lambda inputs: F.linear(inputs, weight.flip(0), bias)


def deep(blocks=24):
    """A bundle whose model is random and deep: each block adds to the errors of those before."""
    settings = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, num_hidden_layers=blocks, max_position_embeddings=64, initializer_range=0.3, **settings
    )
    return Bundle.of("deep", transformers.LlamaForCausalLM(config), None)


def profile(**options):
    return measured(TinyModel().load("llama"), (1,), Fake(**options), parts=["prefill"])


def test_every_way_is_profiled():
    """Each way has the parts of its time; merged ways have one product for layers that read the same input."""
    found = profile()
    assert (found.products, found.models) == ([], [])
    assert [one.way for one in found.prefill] == [way.name for way in (*DENSE_WAYS, *SPARSE_WAYS)]
    for one in found.prefill:
        assert one.count == (GROUPS if "merged" in one.way else LAYERS)
        assert (one.problem, one.device, one.launched) == (None, 1.0, 19)
        assert one.relative_error < 1e-5 and one.product_error < 1e-5
        assert one.other == one.graph.median - one.products.median
        assert one.launches == one.eager.median - one.graph.median
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))["prefill"]
    assert content[0]["speedup"] == content[0]["products_speedup"] == 1.0
    assert "of that products" in render(found)


def test_the_model_is_left_pruned_and_whole():
    """The layers of the model are its own again, and 2:4."""
    bundle = TinyModel().load("llama")
    before = dict(bundle.model.named_modules())
    measured(bundle, (1,), Fake(), parts=["prefill"])
    assert dict(bundle.model.named_modules()) == before
    assert (TWO_FOUR.kept(bundle.layers["model.layers.0.self_attn.q_proj"].read() != 0) == 2).all()


def test_a_way_that_the_device_lacks_says_why():
    """A form that is missing, or that fails, is one line with the reason; other ways have figures."""
    found = profile(forms={FP8_CUTLASS: "torchao is not installed", FP8: refusing})
    problems = {one.way: one.problem for one in found.prefill if one.problem}
    assert problems == {f"{FP8_CUTLASS}, merged": "torchao is not installed", f"{FP8}, merged": "no such kernel"}
    assert "torchao is not installed" in render(found)
    assert json.loads(json.dumps(found.to_dict()))["prefill"][2]["speedup"] is None


def test_a_wrong_way_has_no_figures():
    """A product with exchanged rows is not timed, also where FP8 may round; the first wrong layer is named."""
    found = profile(forms={TORCH: exchanging, FP8_CUTLASS: exchanging})
    wrong = {one.way: one.problem for one in found.prefill if one.problem}
    assert list(wrong) == [TORCH, f"{FP8_CUTLASS}, merged"]
    assert all(" model.layers.0.self_attn.q_proj differ by 1." in text for text in wrong.values())
    assert [text.rpartition(" ")[2] for text in wrong.values()] == ["0.016", "0.14"]


def test_columns_of_another_layer_are_wrong(monkeypatch):
    """The outputs of each layer are compared, so that right products that reach other layers are refused."""
    monkeypatch.setattr("nmbench.runtime.sparse24.linear.joined", lambda weights: torch.cat([*weights][::-1]))
    wrong = [one.way for one in profile().prefill if one.problem and "wrong" in one.problem]
    assert wrong == [way.name for way in (*DENSE_WAYS, *SPARSE_WAYS) if way.merged]


def test_rounding_is_judged_by_products():
    """In a deep random model, FP8's rounding changes the logits altogether; its products are right and timed."""
    forms = {name: "left out" for name in FORMS if name != DENSE} | {FP8: rounding, FP8_CUTLASS: rounding}
    found = measured(deep(), (1,), Fake(forms=forms), parts=["prefill"])
    fp8 = [one for one in found.prefill if one.way in (f"{FP8}, merged", f"{FP8_CUTLASS}, merged")]
    assert len(fp8) == 2
    for one in fp8:
        assert (one.problem, one.relative_error > 0.5) == (None, True)
        assert 0.02 < one.product_error < most_error(FP8)
        assert one.best


def test_the_rounding_of_fp8_is_not_allowed_in_half_precision():
    """A product in half precision that is as far off as FP8 is wrong, and so is one that is not a number."""
    nothing = lambda weight, bias: lambda inputs: F.linear(inputs, weight) * torch.nan  # noqa: E731
    found = profile(forms={SEARCHED: rounding, FP8: nothing})
    wrong = {one.way: one.problem for one in found.prefill if one.problem}
    assert list(wrong) == [f"{FP8}, merged", SEARCHED, f"{SEARCHED}, merged"]
    assert "differ by nan" in wrong[f"{FP8}, merged"]


def test_logits_that_are_not_finite_are_wrong():
    """A model whose own logits are not numbers has no figures."""
    bundle = TinyModel().load("llama")
    bundle.model.lm_head.weight.data[0] = torch.nan
    found = measured(bundle, (1,), Fake(), parts=["prefill"])
    assert {one.problem for one in found.prefill} == {"wrong: its logits are not finite"}


def test_the_faster_of_eager_and_graph_is_compared():
    """A graph that is slower than its eager prefill is not what the speedup refers to, of either way."""

    def timed(eager, graph):
        return Prefill("a way", 8, eager=Times.of([eager] * 2), graph=Times.of([graph] * 2) if graph else None)

    dense = timed(2.0, 3.0)
    assert timed(4.0, 1.5).to_dict(dense)["speedup"] == 2.0 / 1.5
    assert timed(1.0, None).to_dict(dense)["speedup"] == 2.0
    assert prefill_row(timed(1.6, 2.5), dense)["is"] == "1.25 x"


def test_ways_that_begin_too_late_are_left_out():
    """After the seconds are spent, ways are named without figures; the report stands."""
    found = measured(TinyModel().load("llama"), (1,), Fake(), seconds=0, parts=["prefill"])
    assert {one.problem for one in found.prefill} == {"not begun within 0 seconds"}
    assert found.to_dict()["prefill"][0]["speedup"] is None
    assert "not begun" in render(found)


def test_without_graphs_eager_stands():
    """Where no graph can be recorded, the parts are missing and the speedup is that of eager times."""
    found = profile(graphs=False)
    assert {(one.graph, one.products, one.other, one.launches) for one in found.prefill} == {(None,) * 4}
    assert found.to_dict()["prefill"][0]["speedup"] == 1.0


def test_the_merged_whole_model():
    """`merged` converts every layer and keeps the logits of the pruned model."""
    bundle, hardware = TinyModel().load("llama"), Fake()
    tokens = torch.arange(12)[None]
    found = measured(bundle, (1,), hardware, merged=True, parts=["model"])
    assert (found.converted, found.environment["merged"]) == (LAYERS, True)
    assert {(model.task.split()[0], model.launch) for model in found.models} >= {("prefill", "graph")}
    expected = TinyModel().load("llama")
    for name, layer in expected.layers.items():
        if not name.endswith("down_proj"):
            layer.write(layer.read() * TWO_FOUR.top(layer.read().abs()))
    with torch.inference_mode():
        ours, theirs = (model(input_ids=tokens).logits for model in (bundle.model, expected.model))
    torch.testing.assert_close(ours, theirs)


def test_merged_without_cusparselt_is_refused():
    """The error names the reason and the remedy."""
    with pytest.raises(NMBenchError, match=r"no cuSPARSELt; leave --merged out"):
        convert_merged(TinyModel().load("llama"), TWO_FOUR, Fake(forms={CUSPARSELT: "no cuSPARSELt"}))


def test_products_of_many_tokens_have_other_forms():
    """Products of 128 tokens and more are timed in every other form, or have the reason; few tokens have FP8 alone."""
    found = measured(TinyModel().load("llama"), (1, 128), Fake(forms={FP8: refusing}), parts=["products"])
    for product in found.products:
        forms = {other.form: other for other in product.alternatives}
        assert set(forms) == (set(FORMS) - {DENSE, TORCH} if product.tokens == 128 else {FP8, FP8_CUTLASS})
        assert all(other.times and other.relative_error < 1e-5 for name, other in forms.items() if name != FP8)
    assert f"{FP8}: no such kernel" in render(found)
    plain = found.to_dict()["products"]
    assert {other["speedup"] for one in plain for other in one["alternatives"]} == {1.0, None}


def test_a_wrong_form_is_not_timed():
    """A product in another form that is not the dense one has a reason and no time."""
    wrong = lambda weight, bias: lambda inputs: F.linear(inputs, weight) + 1  # noqa: E731
    found = measured(TinyModel().load("llama"), (128,), Fake(forms={FP8_CUTLASS: wrong}), parts=["products"])
    for product in found.products:
        (other,) = (one for one in product.alternatives if one.problem)
        assert (other.form, other.times) == (FP8_CUTLASS, None)
        assert other.problem.startswith("wrong: its product differs")
