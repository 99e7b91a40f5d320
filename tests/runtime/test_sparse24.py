"""Layers that share a product compute what they computed alone; FP8 rounding is to nearest, with a scale per row."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nmbench.errors import NMBenchError
from nmbench.pattern import Pattern
from nmbench.runtime import triton_available
from nmbench.runtime.sparse24 import SharedProduct, multiplying, shared_inputs, to_sparse24
from nmbench.runtime.sparse24.forms import FORMS, SEARCHED, TORCH, dense, padded, problem_of
from nmbench.runtime.sparse24.linear import joined_bias
from nmbench.runtime.sparse24.quantise import FP8, LARGEST, by_torch, quantised, quantised_rows
from nmbench.testing import strategies
from nmbench_plugins.tiny import TinyModel

TWO_FOUR = Pattern(2, 4)
few = settings(max_examples=20, deadline=None)
on_gpu = pytest.mark.skipif(not triton_available("cuda"), reason="needs an NVIDIA GPU and Triton")


class Block(nn.Module):
    """q and k read one input, v a copy of it; `again` is called twice."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 4), nn.Linear(8, 12, bias=False), nn.Linear(8, 4)
        self.again = nn.Linear(8, 4)

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x), self.v(x.clone()), self.again(x), self.again(x)], dim=-1)


def test_shared_inputs_are_observed():
    """Layers with the same tensor one after the other are a group; a copy, or a layer called twice, stands alone."""
    block = Block()
    layers = dict(block.named_children())
    assert shared_inputs(layers, lambda: block(torch.ones(2, 8))) == [["q", "k"], ["v"], ["again"]]
    assert shared_inputs(layers, lambda: None) == [["q"], ["k"], ["v"], ["again"]]
    assert not block.q._forward_pre_hooks


@pytest.mark.parametrize("groups", [[["q", "k", "v"], ["again"]], [["k", "q"]], [["q"], ["k"], ["v"]]], ids=str)
@pytest.mark.parametrize("batch", [(3,), (2, 5), ()], ids=str)
def test_merged_layers_compute_the_same(groups, batch):
    """Any grouping gives the outputs of separate layers, biases included, and the layers are put back."""
    block, before = Block(), None
    x = torch.randn(*batch, 8)
    expected, before = block(x), dict(block.named_children())
    with multiplying(block, groups, dense, lambda name: before[name].weight) as products:
        assert len(products) == len(groups)
        torch.testing.assert_close(block(x), expected)
        torch.testing.assert_close(block(x), expected)
    assert dict(block.named_children()) == before


def test_one_product_serves_all_members_and_is_let_go():
    """The product of an input is computed once for all members, again for another input, and not kept."""
    seen = []
    shared = SharedProduct(lambda rows: seen.append(rows) or rows * 2, members=2)
    x, y = torch.ones(2, 3), torch.ones(2, 3)
    assert shared(x) is shared(x)
    assert (len(seen), shared._outputs) == (1, None)
    shared(x), shared(y), shared(y)
    assert (len(seen), shared._outputs) == (3, None)


def test_layers_are_put_back_after_an_error():
    """A form that fails leaves the model as it was."""
    block, before = Block(), None
    before = dict(block.named_children())

    def failing(weight, bias):
        if weight.shape[0] == 12:
            raise RuntimeError
        return dense(weight, bias)

    with pytest.raises(RuntimeError), multiplying(block, [["q"], ["k"]], failing, lambda name: before[name].weight):
        pass
    assert dict(block.named_children()) == before


def test_missing_biases_are_zeros():
    """Layers with and without bias have one bias together; without any there is none."""
    block = Block()
    assert torch.equal(joined_bias([block.q, block.k]), torch.cat([block.q.bias, torch.zeros(12)]))
    assert joined_bias([block.k, block.k]) is None


@pytest.mark.parametrize("merged", [True, False])
def test_a_pruned_model_is_converted(merged):
    """`to_sparse24` replaces the 2:4 layers, leaves the others, and keeps the logits."""
    bundle, tokens = TinyModel().load("llama"), torch.arange(10)[None]
    for layer in list(bundle.layers.values())[1:]:
        layer.write(layer.read() * TWO_FOUR.top(layer.read().abs()))
    with torch.no_grad():
        expected = bundle.model(input_ids=tokens).logits
        options = {"tokens": tokens, "merged": True} if merged else {}
        assert to_sparse24(bundle.model, form=dense, **options) == 2 * 6 - 1  # down_proj has 96 inputs
        torch.testing.assert_close(bundle.model(input_ids=tokens).logits, expected)


def test_a_model_that_is_not_pruned():
    """The error says what is missing."""
    with pytest.raises(NMBenchError, match=r"no linear layer with a 2:4 weight"):
        to_sparse24(TinyModel().load("llama").model, form=dense)


def test_products_are_searched_and_single_by_default():
    """`to_sparse24` searches for the fastest algorithm, and merges only if asked to, for which it needs tokens."""
    defaults = {name: option.default for name, option in inspect.signature(to_sparse24).parameters.items()}
    assert (defaults["form"], defaults["merged"]) == (FORMS[SEARCHED], False)
    with pytest.raises(NMBenchError, match=r"merged=True needs tokens"):
        to_sparse24(TinyModel().load("llama").model, merged=True)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17])
def test_padding(tokens):
    """Rows are padded with zeros to a multiple of 16, and are contiguous."""
    found = padded(torch.ones(6, tokens).t())
    assert (len(found) % 16, found.is_contiguous(), float(found.sum())) == (0, True, 6.0 * tokens)


@few
@given(st.integers(1, 5), st.integers(1, 40), st.sampled_from(["normal", "ties", "zeros"]), st.integers(0, 2**31))
def test_rounding_to_fp8(rows, columns, kind, seed):
    """FP8 times scale is the row to half a step of e4m3; the largest of a row becomes 448; zeros stay zeros."""
    values = strategies.values(kind, (rows, columns), seed).bfloat16()
    for rounded, scale in (quantised_rows(values), quantised(values)):
        assert rounded.dtype == FP8
        back = rounded.float() * scale
        largest = values.float().abs().amax() if scale.numel() == 1 else values.float().abs().amax(1, keepdim=True)
        assert ((back - values.float()).abs() <= values.float().abs() / 14 + largest * 2.0**-9 / LARGEST + 1e-30).all()
        assert (rounded.float().abs() <= LARGEST).all()


def test_products_in_fp8_are_near():
    """A product of rounded rows is within 6 % of the product in every output, also where rows differ in size."""
    weight = strategies.values("normal", (32, 64), 0) * torch.logspace(-6, 0, 32)[:, None]
    x = strategies.values("normal", (200, 64), 1)
    (a, s), (b, t) = quantised_rows(x), quantised_rows(weight)
    error = (a.float() * s) @ (b.float() * t).t() - F.linear(x, weight)
    relative = error.norm(dim=0) / F.linear(x, weight).norm(dim=0)
    assert (relative < 0.06).all()


@on_gpu
@pytest.mark.parametrize("columns", [64, 4096, 14336])
def test_the_triton_program_rounds_as_torch_does(columns):
    """The program's FP8 and scales are those of plain torch, bit for bit where the quotients are."""
    rows = torch.randn(33, columns, device="cuda").bfloat16()
    rows[3] = 0
    (ours, scale), (theirs, expected) = quantised_rows(rows), by_torch(rows)
    torch.testing.assert_close(scale, expected)
    assert (ours.float() != theirs.float()).float().mean() < 0.01


@on_gpu
@pytest.mark.parametrize("name", list(FORMS))
@pytest.mark.parametrize("tokens", [1, 40])
def test_forms_on_a_gpu(name, tokens):
    """Every form that this GPU has gives the dense product in contiguous rows, with and without a bias."""
    if problem := problem_of(name):
        pytest.skip(problem)
    weight = torch.randn(256, 512, device="cuda").bfloat16()
    weight = weight * TWO_FOUR.top(weight.abs())
    x, bias = (torch.randn(*shape, device="cuda").bfloat16() for shape in ((tokens, 512), (256,)))
    for own in (None, bias):
        found = FORMS[name](weight, own)(x)
        expected = F.linear(x, weight, own)
        assert (found - expected).float().norm() < 0.06 * expected.float().norm()
        assert found.is_contiguous() or name == TORCH
