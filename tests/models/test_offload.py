"""Laws of streaming: one block at a time is on the device, and results are those of the model that is all there."""

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from nmbench.evaluation.losses import window_losses
from nmbench.methods import Baseline, PrunedModel, Refiner
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.pattern import Pattern
from nmbench.pruning.one_shot import prune_one_shot
from nmbench_plugins.magnitude import Magnitude
from nmbench_plugins.sparsegpt import SparseGPT
from nmbench_plugins.swaps import Swaps
from nmbench_plugins.tiny import TinyModel
from nmbench_plugins.wanda import Wanda
from reference.tiers import tiered

CPU = torch.device("cpu")
METHODS = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "sparsegpt": SparseGPT(),
    "in turn": SparseGPT(sequential=True),
    "swaps": Swaps(),
}
FAMILIES = ("llama", "gemma3", "gpt2")
families = pytest.mark.parametrize("family", FAMILIES)
runs = pytest.mark.parametrize(
    ("family", "method"),
    tiered(
        FAMILIES, METHODS, fast=lambda *case: case[0] == "llama" or case in (("gemma3", "in turn"), ("gpt2", "swaps"))
    ),
)


def load(family: str, streamed: bool = True) -> Bundle:
    bundle = TinyModel().load(family)
    if streamed:
        bundle.stream(CPU)
    return bundle


def windows() -> Tensor:
    return torch.randint(256, (6, 24), generator=torch.Generator().manual_seed(0))


def prune(bundle: Bundle, method: Baseline) -> PrunedModel:
    patterns = dict.fromkeys(bundle.layers, Pattern(2, 4))
    init = Wanda() if isinstance(method, Refiner) else None
    return prune_one_shot(bundle, DenseWeights(bundle), method, patterns, windows(), "it", init=init).pruned


def watched(bundle: Bundle) -> list[int]:
    """Return the number of blocks on the device at each call of a layer."""
    seen: list[int] = []
    for layer in bundle.layers.values():
        layer.module.register_forward_pre_hook(lambda module, args: seen.append(len(bundle.streaming.present)))
    return seen


def addresses(bundle: Bundle) -> list[int]:
    return [parameter.data_ptr() for parameter in bundle.model.parameters()]


@dataclass(frozen=True)
class Streamed:
    """What pruning a streamed model made, and what was seen of the model before, meanwhile and afterwards."""

    pruned: PrunedModel
    bundle: Bundle
    before: tuple[list[int], str]
    blocks_at_once: list[int]


@functools.cache
def streamed_run(family: str, method: str) -> Streamed:
    """Prune a streamed model once for all tests, which change nothing."""
    bundle = load(family)
    before, seen = (addresses(bundle), bundle.digest()), watched(bundle)
    return Streamed(prune(bundle, METHODS[method]), bundle, before, seen)


@runs
def test_results_are_the_same(family, method):
    """Masks and weights are, bit for bit, those of a model that is not streamed."""
    streamed, whole = streamed_run(family, method).pruned, prune(load(family, False), METHODS[method])
    assert list(streamed.layers) == list(whole.layers)
    for name, layer in whole.layers.items():
        assert torch.equal(streamed.layers[name].mask, layer.mask)
        assert (streamed.layers[name].weight is None) == (layer.weight is None)
        assert layer.weight is None or torch.equal(streamed.layers[name].weight, layer.weight)


@pytest.mark.parametrize("method", [Wanda(), SparseGPT(sequential=True)], ids=["wanda", "in turn"])
def test_experts_are_streamed_as_well(method):
    """Fused experts of an offloaded model have the same statistics and masks as on one device."""
    streamed, whole = (prune(load("mixtral", streamed), method) for streamed in (True, False))
    assert all(torch.equal(streamed.masks[name], mask) for name, mask in whole.masks.items())


@runs
def test_one_block_at_a_time(family, method):
    """No two blocks are on the device at once, and in the end none is: the host has every weight where it was."""
    run = streamed_run(family, method)
    assert set(run.blocks_at_once) <= {1}
    assert bool(run.blocks_at_once) == (method != "magnitude")
    assert not run.bundle.streaming.present
    assert (addresses(run.bundle), run.bundle.digest()) == run.before


@families
def test_losses_are_the_same(family):
    """An offloaded model has the same logits as one on the device, also in another dtype."""
    streamed, whole = load(family), load(family, streamed=False)
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = streamed.in_dtype(dtype), whole.in_dtype(dtype)
        seen = watched(ours)
        with torch.no_grad():
            assert torch.equal(window_losses(ours.model, windows()), window_losses(theirs.model, windows()))
        assert set(seen) == {1}
        assert not ours.streaming.present
    assert streamed.in_dtype(torch.bfloat16).streaming is not streamed.streaming


def test_what_is_written_to_a_held_block_stays():
    """While a block is held its weights are copies on the device; afterwards the host has what they became."""
    bundle = load("llama")
    layer = bundle.layers["model.layers.1.mlp.up_proj"]
    block = bundle.blocks["model.layers.1"]
    home = layer.read().data_ptr()
    with bundle.holding(block):
        assert layer.read().data_ptr() != home
        block(torch.zeros(1, 3, 64), position_embeddings=(torch.ones(1, 3, 16), torch.zeros(1, 3, 16)))
        assert layer.read().data_ptr() != home  # a forward pass does not end it
        layer.write(torch.full(layer.shape, 2.0))
    assert layer.read().data_ptr() == home
    assert (layer.read() == 2).all()


@pytest.mark.parametrize("where", ["model.layers.0.mlp", "model.layers.1.self_attn"])
def test_nothing_stays_after_an_exception(where):
    """When a layer raises, no block is left on the device and every weight is where it was."""
    bundle = load("llama")

    def fail(module: nn.Module, args: tuple) -> None:
        raise OSError("out of luck")

    handle = bundle.model.get_submodule(where).register_forward_pre_hook(fail)
    before, digest = addresses(bundle), bundle.digest()
    for work in (lambda: prune(bundle, Wanda()), lambda: bundle.model(input_ids=windows())):
        with pytest.raises(OSError, match="out of luck"):
            work()
        assert not bundle.streaming.present
    handle.remove()
    assert (addresses(bundle), bundle.digest()) == (before, digest)


def test_a_run_with_streaming(nmbench, texts, records, tmp_path):
    """Streaming changes no mask and no figure, from memory or from disk; what cannot be streamed is refused."""
    text = ["--calibration", f"text:{texts}/cal.txt", "--metric", f"ppl:text:{texts}/test.txt@64"]
    sizes = ["--windows", 4, "--window-tokens", 32, "--pool-tokens", 2048, "--selection-tokens", 1024]
    flags = ["--model", "tiny:llama", *text, *sizes]
    rows = []
    for stream in (["--stream-from", "disk"], ["--stream"], ["--no-stream"]):
        out = f"out{stream[-1]}"
        result = nmbench("run", "--method", "wanda", "--method", "sparsegpt", *flags, *stream, "--out", out)
        assert result.exit_code == 0, result.output
        rows.append(records(tmp_path / out))
    for ours, others, theirs in zip(*rows, strict=True):
        for name in ("metrics", "proof", "cost", "measured_digest", "protocol_digest", "job_digest"):
            assert ours[name] == others[name] == theirs[name]
        assert others["streamed"] is theirs["streamed"] is None  # on a CPU, blocks in memory are not read ahead
        assert ours["streamed"]["source"] == "disk"
        assert ours["streamed"]["gib"] > 0
    result = nmbench("export", "outdisk", "sparsegpt", "--to", "exported")
    assert result.exit_code == 0, result.output
    for refused, what in (
        ("--no-stream", "leave --no-stream out"),
        ("--eval-dtype=float16", "leave out --eval-dtype"),
    ):
        result = nmbench("run", "--method", "wanda", *flags, "--stream-from", "disk", refused, "--out", "out3")
        assert result.exit_code == 1
        assert what in result.stderr
        assert len(result.stderr.splitlines()) == 1
    result = nmbench("run", "--method", "maskpro", *flags, "--stream", "--out", "out2")
    assert result.exit_code == 1
    assert "a learner of the whole model needs it on the device" in result.stderr
    assert len(result.stderr.splitlines()) == 1
