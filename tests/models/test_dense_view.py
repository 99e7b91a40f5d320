"""Laws of the dense model beside the pruned one: it is the dense model, and the pruned one does not notice."""

import pytest
import torch

from nmbench.errors import NMBenchError
from nmbench.evaluation.subject import DenseSubject, Subject
from nmbench.models.bundle import Bundle
from nmbench.models.dense_view import DenseView
from nmbench.models.dense_weights import DenseWeights
from nmbench.pattern import Pattern
from nmbench_plugins.tiny import FAMILIES, TinyModel

TOKENS = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(0))


def pruned_by_magnitude(bundle: Bundle) -> Bundle:
    for layer in bundle.layers.values():
        layer.write(layer.read() * Pattern(2, 4).top(layer.read().abs()))
    return bundle


def logits(bundle: Bundle) -> torch.Tensor:
    with torch.no_grad():
        return bundle.model(input_ids=TOKENS).logits


@pytest.fixture(params=sorted(FAMILIES))
def pair(request):
    """A dense bundle, and a pruned copy with a view of its dense weights."""
    pruned = TinyModel().load(request.param)
    weights = DenseWeights(pruned)
    return TinyModel().load(request.param), pruned_by_magnitude(pruned), weights


def test_what_is_shown_is_dense(pair):
    """In the context a forward pass is, bit for bit, that of the dense model; before and after, the pruned one's."""
    dense, pruned, weights = pair
    before = logits(pruned)
    with DenseView(pruned, weights.copies).shown():
        assert torch.equal(logits(pruned), logits(dense))
    assert torch.equal(logits(pruned), before)
    assert not torch.equal(before, logits(dense))


def test_live_weights_are_set_aside_not_written(pair):
    """The tensors of the pruned model, their addresses and their hash, are the same before, in and after it."""
    _, pruned, weights = pair
    places, digest = {n: t.data_ptr() for n, t in pruned.tensors().items()}, pruned.digest()
    with DenseView(pruned, weights.copies).shown():
        logits(pruned)
        assert pruned.digest() == digest
    assert {n: t.data_ptr() for n, t in pruned.tensors().items()} == places
    assert pruned.digest() == digest
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pruned.model.modules())


@pytest.mark.parametrize("where", ["model.layers.0", "model.layers.1.mlp.up_proj", "lm_head"])
def test_a_pass_that_fails_leaves_the_model_pruned(where):
    """An exception in any module leaves all live weights where they were."""
    pruned = TinyModel().load("llama")
    weights = DenseWeights(pruned)
    digest = pruned_by_magnitude(pruned).digest()

    def fail(module, args):
        raise RuntimeError("stop here")

    hook = pruned.model.get_submodule(where).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop here"), DenseView(pruned, weights.copies).shown():
        logits(pruned)
    hook.remove()
    assert pruned.digest() == digest


def test_evaluation_in_another_dtype():
    """In an evaluation of another dtype, the view is the dense model cast to that dtype."""
    bundle = TinyModel("bfloat16").load("llama")
    weights = DenseWeights(bundle)
    dense = bundle.in_dtype(torch.float32)
    pruned = pruned_by_magnitude(bundle).in_dtype(torch.float32)
    with DenseView(pruned, weights.copies).shown():
        assert torch.equal(logits(pruned), logits(dense))
    assert logits(pruned).dtype == torch.float32


def test_a_swap_within_another():
    """Outer hooks that exchange a block's weights, as those of offloading, find their own tensors again."""
    dense, pruned = TinyModel().load("llama"), TinyModel().load("llama")
    weights = DenseWeights(pruned)
    pruned_by_magnitude(pruned)
    homes = {}

    def bring(block, args):
        for parameter in block.parameters():
            homes[parameter] = parameter.data
            parameter.data = parameter.data.clone()

    def drop(block, args, output):
        for parameter in block.parameters():
            assert torch.equal(parameter.data, homes[parameter])
            parameter.data = homes.pop(parameter)

    for block in pruned.blocks.values():
        block.register_forward_pre_hook(bring)
        block.register_forward_hook(drop)
    places = {n: t.data_ptr() for n, t in pruned.tensors().items()}
    with DenseView(pruned, weights.copies).shown():
        assert torch.equal(logits(pruned), logits(dense))
    assert {n: t.data_ptr() for n, t in pruned.tensors().items()} == places
    assert not homes


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_streamed_model(family):
    """The view also works for a pruned model with offloaded blocks."""
    dense, pruned = TinyModel().load(family), TinyModel().load(family)
    weights = DenseWeights(pruned)
    pruned_by_magnitude(pruned)
    before, digest = logits(pruned), pruned.digest()
    pruned.stream(torch.device("cpu"))
    with DenseView(pruned, weights.copies).shown():
        assert torch.equal(logits(pruned), logits(dense))
    assert torch.equal(logits(pruned), before)
    assert pruned.digest() == digest


def test_the_dense_model_is_asked_for_where_there_is_none():
    """Losses alone make no logits: that is an error, not a guess."""
    with pytest.raises(NMBenchError, match="dense model is not available"):
        DenseSubject({"toy@16": torch.ones(3)}).logits(TOKENS)


def test_logits_have_a_next_token():
    """A metric gets the logits of the positions before the last, of either model, without gradients."""
    pruned = TinyModel().load("llama")
    weights = DenseWeights(pruned)
    expected = logits(pruned)[:, :-1]
    subject = Subject(pruned_by_magnitude(pruned), {"toy": TOKENS.flatten()})
    dense = DenseSubject({}, model=DenseView(pruned, weights.copies))
    (batch,) = subject.batches("toy", 20)
    assert torch.equal(batch, TOKENS)
    assert torch.equal(dense.logits(batch), expected)
    assert torch.equal(subject.logits(batch), logits(pruned)[:, :-1])
    assert not dense.logits(batch).requires_grad
