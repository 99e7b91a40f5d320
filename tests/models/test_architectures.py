"""Laws of every architecture: pruned strictly wherever it can be, and loaded again by transformers as it was."""

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from nmbench.calibration.arguments import tensors_of
from nmbench.calibration.walk import walk
from nmbench.methods import Baseline, Stat
from nmbench.models.applying import apply
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.pattern import Pattern
from nmbench.pruning.one_shot import prune_one_shot
from nmbench.verification.strict import check_strict
from nmbench_plugins.magnitude import Magnitude
from nmbench_plugins.sparsegpt import SparseGPT
from nmbench_plugins.tiny import FAMILIES, TinyModel
from nmbench_plugins.wanda import Wanda
from reference.tiers import tiered

WINDOW = 24
families = pytest.mark.parametrize("family", sorted(FAMILIES))
UNTOUCHED = ("norm", "embed", "lm_head", "wte", "wpe", "ln_", "bias", "mlp.gate.weight")  # parts of names


def random_windows() -> Tensor:
    return torch.randint(256, (6, WINDOW), generator=torch.Generator().manual_seed(0))


def pruned(bundle: Bundle, method: Baseline, pattern: Pattern) -> dict:
    """Prune the live model for good; returns the proof of strictness of its very weights."""
    patterns = dict.fromkeys(bundle.layers, pattern)
    done = prune_one_shot(bundle, DenseWeights(bundle), method, patterns, random_windows(), "it").pruned
    apply(bundle, done)
    return check_strict({n: layer.read() for n, layer in bundle.layers.items()}, done.masks, patterns, "it")


@pytest.mark.parametrize(
    ("family", "pattern", "method"),
    tiered(
        sorted(FAMILIES),
        [Pattern(2, 4), Pattern(1, 8)],
        [Magnitude(), Wanda(), SparseGPT()],
        fast=lambda family, pattern, method: (pattern.group == 4) == isinstance(method, SparseGPT),
    ),
    ids=lambda it: type(it).__name__ if isinstance(it, Baseline) else str(it),
)
def test_strictly_pruned_where_prunable(family, method, pattern):
    """Every prunable weight of the live model is strictly N:M, and no other parameter has changed."""
    bundle, dense = TinyModel().load(family), TinyModel().load(family)
    proof = pruned(bundle, method, pattern)
    stored = {layer.where.stored for layer in bundle.layers.values()}
    assert proof["weights"] == sum(bundle.model.get_parameter(name).numel() for name in stored)
    assert proof["zeros"] == proof["weights"] * (pattern.group - pattern.keep) / pattern.group
    for name, parameter in bundle.model.named_parameters():
        same = torch.equal(parameter, dense.model.get_parameter(name))
        assert same != (name in stored), name
        assert (name in stored) != any(part in name for part in UNTOUCHED), name


@families
def test_saved_and_loaded_again(family, tmp_path):
    """A pruned model that transformers saves and loads gives the same logits, and is as strict as it was."""
    bundle = TinyModel().load(family)
    pruned(bundle, Magnitude(), Pattern(2, 4))
    bundle.model.save_pretrained(tmp_path)
    again = Bundle.of("again", AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), None)
    for name, layer in bundle.layers.items():
        assert torch.equal(again.layers[name].read(), layer.read())
    with torch.no_grad():
        ours, theirs = (b.model(input_ids=random_windows()).logits for b in (bundle, again))
    assert torch.equal(ours, theirs)


@families
def test_arguments_of_blocks(family):
    """Every block of a walk is called with the arguments that a plain forward pass calls it with."""
    bundle, plain, walked = TinyModel().load(family), {}, {}

    def listener(found: dict, name: str):
        return lambda module, args, kwargs: found.update({name: list(tensors_of((args[1:], without_hidden(kwargs))))})

    for found in (plain, walked):
        handles = [
            block.register_forward_pre_hook(listener(found, name), with_kwargs=True)
            for name, block in bundle.blocks.items()
        ]
        if found is plain:
            bundle.model(input_ids=random_windows(), use_cache=False)
        else:
            list(walk(bundle, random_windows(), Stat.INPUT_NORM))
        for handle in handles:
            handle.remove()
    assert all(same(plain[name], walked[name]) for name in bundle.blocks)
    if family == "gemma3":
        assert not same(*plain.values())  # its blocks alternate between masks and between rotary tables


def without_hidden(kwargs: dict) -> dict:
    return {name: value for name, value in kwargs.items() if name != "hidden_states"}


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))
