"""Laws of the estimate of device memory."""

import importlib
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nmbench.calibration.waiting import hidden_bytes
from nmbench.experiment.memory import GIBIBYTE, Estimate, Learning, bytes_of, estimate
from nmbench.experiment.progress import ProgressPrinter
from nmbench.experiment.whereabouts import rounding
from nmbench.methods import MaskLearner, Stat
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.pattern import Pattern
from nmbench.pruning.learning import LearnTask
from nmbench.pruning.one_shot import prune_one_shot
from nmbench.results.files import MemoryCheckpoints
from nmbench_plugins.maskllm import MaskLLM
from nmbench_plugins.maskpro.learner import MaskPro
from nmbench_plugins.soft import Soft
from nmbench_plugins.sparsegpt import SparseGPT
from nmbench_plugins.swaps import Swaps, SwapsJudged
from nmbench_plugins.tiny import FAMILIES, TinyModel
from nmbench_plugins.wanda import Wanda
from reference.live import Live
from reference.tiers import tiered

FLAGS = (Stat.NONE, Stat.INPUT_NORM, Stat.GRAM, Stat.GRAM | Stat.DRIFT, Stat.GRAM | Stat.DRIFT | Stat.LAG)


def of(bundle: Bundle, needs: Stat = Stat.GRAM, windows: int = 128, tokens: int = 2048, streamed: bool = False):
    return estimate(bundle, needs, windows, tokens, "cuda", streamed, 4096)


def llama(width: int, inner: int, blocks: int, heads: int) -> Bundle:
    """A Llama 3 without weights, in bfloat16."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        return Bundle.of("shape", LlamaForCausalLM(config).to(torch.bfloat16), None)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_needs_more(family):
    """More statistics and more windows never need less, and streaming never more; weights are those of the model."""
    bundle = TinyModel().load(family)
    peaks = [of(bundle, needs).peak for needs in FLAGS]
    assert peaks == sorted(peaks)
    assert of(bundle, windows=256).peak > of(bundle).peak
    assert of(bundle, streamed=True).peak < of(bundle).peak
    assert of(bundle, streamed=True, windows=256) == of(bundle, streamed=True)
    assert of(bundle).weights == bytes_of(bundle.model)


@pytest.mark.parametrize(
    ("shape", "most", "least"), [((4096, 14336, 32, 32), 12, 5), ((8192, 28672, 80, 64), 48, 20)], ids=["8b", "70b"]
)
def test_shapes_larger_than_a_device(shape, most, least):
    """Llama 3 of 8 and 70 billion weights can be pruned by SparseGPT in this many GiB, block by block."""
    bundle = llama(*shape)
    assert least < of(bundle, streamed=True).peak / GIBIBYTE < most
    assert of(bundle).weights > 14 * GIBIBYTE


METHODS = {
    "wanda": Wanda(),
    "sparsegpt": SparseGPT(),
    "in turn": SparseGPT(sequential=True),
    "swaps": Swaps(sweeps=1),
}
SIZES = {"many statistics": (128, 256), "one large layer": (32, 512)}
COSTLY = (("sparsegpt", "many statistics"), ("in turn", "one large layer"), ("swaps", "one large layer"))


@pytest.mark.parametrize(("method", "size"), tiered(METHODS, SIZES, fast=lambda *case: case not in COSTLY))
def test_what_is_used_stays_below(method, size):
    """The memory of a walk besides the model stays below the estimate, and the estimate is not far off."""
    method, (width, inner) = METHODS[method], SIZES[size]
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    bundle = Bundle.of("it", LlamaForCausalLM(config), None)
    dense, patterns = DenseWeights(bundle), dict.fromkeys(bundle.layers, Pattern(2, 4))
    windows = torch.randint(64, (16, 64), generator=torch.Generator().manual_seed(0))
    with Live() as live:
        prune_one_shot(bundle, dense, method, patterns, windows, "it", init=Wanda())
    planned = estimate(bundle, method.needs | Stat.INPUT_NORM, 16, 64, "cpu", False, 1024)
    besides = planned.peak - sum(map(bytes_of, bundle.blocks.values()))
    assert live.peak < besides < 4 * live.peak


@pytest.mark.parametrize(("method", "scale"), [(Wanda(), 16), (Swaps(sweeps=1), 32)], ids=["wanda", "swaps"])
def test_a_streamed_walk_needs_what_is_estimated(method, scale, monkeypatch):
    """For a slice of the 8B shape on a small scale, in its proportions, the estimate is at most a tenth too high."""
    config = LlamaConfig(
        vocab_size=128256 // scale,
        hidden_size=4096 // scale,
        intermediate_size=14336 // scale,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    bundle = Bundle.of("it", LlamaForCausalLM(config).to(torch.bfloat16), None)
    bundle.stream(torch.device("cpu"))
    dense, patterns = DenseWeights(bundle), dict.fromkeys(bundle.layers, Pattern(2, 4))
    windows = torch.randint(64, (4, 128), generator=torch.Generator().manual_seed(0))
    at_once = 128  # tokens; on a CPU, which converts them, a batch takes in proportion what twice as many take on a GPU
    monkeypatch.setattr(importlib.import_module("nmbench.calibration.walk"), "BATCH_TOKENS", at_once)
    with Live([windows, *bundle.tensors().values()]) as live:
        live.streaming(monkeypatch)
        prune_one_shot(bundle, dense, method, patterns, windows, "it", init=Wanda() if method.sequential else None)
    needs = method.needs | Stat.INPUT_NORM
    planned = estimate(bundle, needs, 4, 128, "cpu", True, at_once, sequential=method.sequential)
    outside = bytes_of(bundle.model) - sum(map(bytes_of, bundle.blocks.values()))
    assert 0.9 * planned.peak < outside + live.peak <= planned.peak


class Silent(MaskLearner):
    """A learner that does not estimate its memory."""


def test_learners_are_in_it():
    """A learner needs the model and its own bytes per prunable weight; the estimate says if these are unknown."""
    bundle = TinyModel().load("llama")
    count = sum(layer.read().numel() for layer in bundle.layers.values())
    learners = [MaskPro(), MaskPro(steps=3), MaskPro(engine="torch"), SwapsJudged(), Silent()]
    found = estimate(bundle, Stat.NONE, 8, 64, "cuda", False, 4096, learners).learning
    assert [it.name for it in found] == ["MaskPro", "MaskPro", "SwapsJudged", "Silent"]
    assert {it.weights for it in found} == {bytes_of(bundle.model)}
    size = bundle.dtype.itemsize
    assert [it.own for it in found] == [4 * count, (4 + 4 + 1 + size) * count, (size + 2) * count, None]
    assert estimate(bundle, Stat.NONE, 8, 64, "cuda", False, 4096).learning == ()


def test_a_learner_by_blocks_needs_one_block():
    """It needs copies of the largest block and its own bytes for that block; streamed, without room, the rest is on the
    host.
    """
    bundle = TinyModel().load("llama")
    largest = max(map(bytes_of, bundle.blocks.values()))
    count = sum(layer.read().numel() for layer in bundle.block_layers(0))
    outside = bytes_of(bundle.model) - sum(map(bytes_of, bundle.blocks.values()))
    for streamed in (True, False):
        planned = estimate(bundle, Stat.NONE, 8, 64, "cuda", streamed, 4096, [Soft(scope="block")], pool_tokens=1000)
        (found,) = planned.learning
        assert found.weights == (outside + largest if streamed else bytes_of(bundle.model)) + 4 * largest
        assert found.own == (4 + 8 + 2 * bundle.dtype.itemsize) * count
        assert (found.hidden > 0) != streamed
        assert planned.most == max(planned.peak, found.least)
        assert str(planned).endswith("activations not included; it learns one block at a time")


def test_hidden_states_of_a_streamed_model_count_where_there_is_room():
    """With room on the device they wait there, as in a walk that is not streamed; one byte less, and they are away."""
    bundle = TinyModel().load("llama")
    needed = hidden_bytes(bundle, 8 * 64, paths=2)
    args = bundle, Stat.GRAM | Stat.DRIFT, 8, 64, "cuda"
    (there, away, resident) = (
        estimate(*args, streamed, 4096, [Soft(scope="block")], pool_tokens=8 * 64, room=room)
        for streamed, room in ((True, needed), (True, needed - 1), (False, 0))
    )
    assert there.hidden == resident.hidden > away.hidden == 0
    assert there.learning[0].hidden == resident.learning[0].hidden > away.learning[0].hidden == 0


@pytest.mark.parametrize(("width", "heads", "times"), [(4096, 32, 1.0), (5120, 40, 1.6)])
def test_pinned_memory_is_rounded_up(width, heads, times):
    """A batch of hidden states takes the next power of two of pinned memory, and what it has on a CPU."""
    bundle = llama(width, 4 * width, 1, heads)
    assert rounding(bundle, 2048, torch.device("cuda")) == times
    assert rounding(bundle, 2048, torch.device("cpu")) == 1.0


def test_an_8b_model_fits_a_gpu_of_80_gib_by_blocks():
    """For the shape of Llama 3.1 8B, learning by blocks needs a few GiB where streamed; the whole model needs 150."""
    bundle = llama(4096, 14336, 32, 32)
    learners = [Soft(scope="block"), Soft()]
    blocks, whole = estimate(bundle, Stat.NONE, 8, 2048, "cuda", True, 4096, learners, pool_tokens=2**20).learning
    assert blocks.least < 10 * GIBIBYTE < 110 * GIBIBYTE < whole.least


def test_a_learner_is_estimated_for_its_patterns():
    """Of several patterns, the estimate is for the one that needs most: gates of 4:8 need more than those of 2:4."""
    bundle = TinyModel().load("llama")
    count = sum(layer.read().numel() for layer in bundle.layers.values())

    def own(*patterns):
        args = bundle, Stat.NONE, 8, 64, "cuda", False, 4096, [MaskLLM(), Soft()]
        return [it.own for it in estimate(*args, patterns=patterns).learning]

    two, four, size = Pattern(2, 4), Pattern(4, 8), 2 * bundle.dtype.itemsize
    assert own(two) == [(12 * 1.5 + size) * count, (12 + size) * count]
    assert own(two, four) == own(four, two) == [(12 * 8.75 + size) * count, (12 + size) * count]


def test_what_a_learner_holds_is_not_less():
    """The peak memory of MaskPro and judged swaps exceeds their own estimates, which leave out activations."""
    bundle = TinyModel().load("llama")
    patterns = dict.fromkeys(bundle.layers, Pattern(2, 4))
    initial = {name: Pattern(2, 4).top(layer.read().abs()) for name, layer in bundle.layers.items()}
    windows = torch.randint(256, (8, 32), generator=torch.Generator().manual_seed(0))
    for method in (MaskPro(steps=3, engine="torch"), SwapsJudged(rounds=1, aims="0/0")):
        dense, store = DenseWeights(bundle), MemoryCheckpoints()
        task = LearnTask(bundle, dense, patterns, initial, windows, windows, 0, store, "it")
        with Live() as live:
            method.learn(task)
        (found,) = estimate(bundle, Stat.NONE, 8, 32, "cpu", False, 4096, [method]).learning
        copy = bundle.dtype.itemsize * found.own // method.bytes_per_weight(bundle.dtype.itemsize)  # none on a CPU
        assert live.peak > found.own - copy


def test_it_is_printed_before_the_run(capsys):
    """Where the device is not the host, the estimate is one line."""
    memory = Estimate("cuda", True, GIBIBYTE, 0, 2 * GIBIBYTE, GIBIBYTE // 2)
    ProgressPrinter().nmbench_run_started(memory)
    assert capsys.readouterr().err == (
        "cuda: at most about 3.5 GiB for one-shot pruning (weights 1.0, hidden 0.0, statistics 2.0, working 0.5); "
        "blocks come from the host one by one\n"
    )
    learners = (Learning("Acme", GIBIBYTE, 2 * GIBIBYTE), Learning("Silent", GIBIBYTE, None))
    ProgressPrinter().nmbench_run_started(replace(memory, learning=learners))
    assert capsys.readouterr().err.endswith(
        "one by one; Acme: at least about 3.0 GiB (weights 1.0, its own 2.0), activations not included; Silent: at "
        "least about 1.0 GiB (weights 1.0), what it holds itself, and activations, not included\n"
    )
    ProgressPrinter().nmbench_run_started(Estimate("cpu", False, 1, 1, 1, 1))
    assert capsys.readouterr().err == ""
