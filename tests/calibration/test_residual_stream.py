"""Laws of taps: where layers write into the residual stream is found by a probe, and the lag is measured there."""

import functools

import pytest
import torch
from torch import Tensor, nn

from nmbench.calibration import residual_stream as taps
from nmbench.calibration.paused_forward import go_on, paused_forwards
from nmbench.calibration.residual_stream import find_taps
from nmbench.calibration.walk import walk
from nmbench.methods import Stat
from nmbench.models.bundle import Bundle
from nmbench.models.hooks import Place
from nmbench.pattern import Pattern
from nmbench_plugins.tiny import TinyModel
from reference import one_shot
from reference.tiers import tiered

WINDOW = 24
LLAMA = {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": ""}
BY_NAME = {  # which sub-module is given the residual stream behind a layer; "" where it leaves the block first
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen3": LLAMA,
    "phi3": LLAMA,
    "gemma2": {},  # a norm lies between
    "gemma3": {},
    "gptneox": {"attention.dense": "", "mlp.dense_4h_to_h": ""},
    "gpt2": {"attn.c_proj": "ln_2", "mlp.c_proj": ""},
    "opt": {"self_attn.out_proj": "final_layer_norm", "fc2": ""},
}
families = pytest.mark.parametrize("family", sorted(BY_NAME))


def random_windows() -> Tensor:
    return torch.randint(256, (6, WINDOW), generator=torch.Generator().manual_seed(0))


def places(family: str) -> dict[str, Place]:
    return {layer: Place(module, output=not module) for layer, module in BY_NAME[family].items()}


@torch.no_grad()
def probe(bundle: Bundle, outlier: float = 0.0) -> list[dict[str, Place]]:
    """The taps of every block, all of which are given the same hidden state, in one channel of it an outlier."""
    found = []
    with paused_forwards(bundle, [random_windows()]) as (forward,):
        hidden = forward.args[0].clone()
        hidden[:, 0, 3] += outlier
        for index, (name, block) in enumerate(bundle.blocks.items()):
            layers = [layer.name.removeprefix(f"{name}.") for layer in bundle.block_layers(index)]
            forward.args = (hidden, *forward.args[1:])
            found.append(find_taps(functools.partial(forward.again, block), block, hidden, layers))
            if not index:
                go_on(bundle, [forward])
    return found


@pytest.mark.parametrize(
    ("family", "dtype", "outlier"),
    tiered(
        sorted(BY_NAME),
        ["float32", "bfloat16"],
        [0.0, 1e4],
        fast=lambda _, dtype, high: (dtype == "bfloat16") == (high > 0),
    ),
)
def test_taps_of_architectures(family, dtype, outlier):
    """The taps are where the architecture adds to its residual stream, in half precision and by an attention sink."""
    assert probe(TinyModel(dtype=dtype).load(family), outlier) == 2 * [places(family)]


@families
def test_a_probe_leaves_no_trace(family):
    """Weights, hooks and the global generator are the same after a probe."""
    bundle = TinyModel().load(family)
    before = bundle.digest(), torch.get_rng_state().tolist()
    probe(bundle)
    assert (bundle.digest(), torch.get_rng_state().tolist()) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in bundle.model.modules())


@pytest.mark.parametrize("runs", [0, 1, 2])
@torch.no_grad()
def test_no_trace_after_an_exception(runs):
    """When the block raises, noise and hooks are gone all the same."""
    left = iter(range(runs))

    def fail(block: Block, hidden: Tensor) -> Tensor:
        output = hidden + block.one(hidden) + block.two(hidden)
        if next(left, None) is None:
            raise OSError("out of luck")
        return output

    block, hidden = Block(fail), torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    usual = hidden + block.one(hidden) + block.two(hidden)
    with pytest.raises(OSError, match="out of luck"):
        find_taps(lambda: block(hidden), block, hidden, ["one", "two"])
    assert torch.equal(hidden + block.one(hidden) + block.two(hidden), usual)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


class Block(nn.Module):
    """A block with layers that `add` combines with the hidden state."""

    def __init__(self, add) -> None:
        super().__init__()
        torch.default_generator.manual_seed(0)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.pass_on, self.norm = nn.Dropout(0.5), nn.LayerNorm(8)
        self.add = add
        self.eval()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.add(self, hidden)


INSIDE, BEHIND = Place("norm", output=False), Place("", output=True)


@pytest.mark.parametrize(
    ("add", "found"),
    [
        (lambda b, h: h + b.one(h), {"one": BEHIND}),
        (lambda b, h: h + b.pass_on(b.one(h)), {"one": BEHIND}),
        (lambda b, h: b.norm(h + b.one(h)), {"one": INSIDE}),
        (lambda b, h: b.norm((h + b.one(h)).flatten(0, 1)).view_as(h), {"one": INSIDE}),
        (lambda b, h: h.clone().add_(b.one(h)), {"one": BEHIND}),
        (lambda b, h: h + b.two(b.norm(h + b.one(h))), {"one": INSIDE, "two": BEHIND}),
        (lambda b, h: h + b.one(h) + b.two(h), {"one": BEHIND, "two": BEHIND}),
        (lambda b, h: (h + b.one(h), "attentions"), {"one": BEHIND}),
        (lambda b, h: h + b.norm(b.one(h)), {}),
        (lambda b, h: h + 0.5 * b.one(h), {}),
        (lambda b, h: h + b.one(b.one(h)), {}),
        (lambda b, h: h + b.one(h)[:, :1], {}),
        (lambda b, h: b.one(h), {}),
        (lambda b, h: h, {}),
    ],
)
@torch.no_grad()
def test_what_is_a_tap(add, found):
    """A tap is where the sum of something and the output as it is can be seen first; else there is none."""
    block, hidden = Block(add), torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    assert find_taps(lambda: block(hidden), block, hidden, ["one", "two"]) == found


@torch.no_grad()
def test_runs_of_a_probe():
    """One run, and another for every layer as wide as the residual stream, are enough."""
    block, hidden, runs = Block(lambda b, h: h + b.one(h) + b.two(h)), torch.zeros(3, 5, 8), []
    find_taps(lambda: runs.append(block(hidden)), block, hidden, ["one", "two"])
    assert len(runs) == 3


@pytest.mark.parametrize(
    ("family", "sequential", "skip"),
    tiered(
        sorted(BY_NAME), [False, True], [0, 1, WINDOW - 1], fast=lambda family, _, skip: skip == 1 or family == "opt"
    ),
)
def test_lag_behind_the_dense_model(family, sequential, skip):
    """The lag is that of the residual stream behind a layer on dense weights, by its inputs, as plain forward passes of
    the dense and of the partly pruned model show them.
    """
    bundle, windows = TinyModel().load(family), random_windows()
    dense, met = one_shot.seen(bundle.model, windows), set()
    for step in walk(bundle, windows, Stat.GRAM | Stat.LAG, sequential, skip):
        plain, block = one_shot.seen(bundle.model, windows), list(bundle.blocks)[step.index]
        for name, place in places(family).items():
            if (layer := f"{block}.{name}") in step.stats:
                met.add(layer)
                tap = (f"{block}.{place.module}", "input") if place.module else (block, "output")
                x, behind = flat(plain[layer, "input"], skip), flat(dense[tap], skip) - flat(plain[tap], skip)
                wanted, got = 2 / len(windows) * behind.T @ x, step.stats[layer].lag
                exact = 1e-5 * float(step.stats[layer].gram.abs().max())
                torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=exact)
                assert step.index == 0 or wanted.abs().max() > 100 * exact
        assert {name for name, stats in step.stats.items() if stats.lag is not None} == met & step.stats.keys()
        for layer in step.layers:
            layer.write(torch.where(Pattern(2, 4).top(layer.read().abs()), layer.read(), 0.0))
    assert len(met) == 2 * len(BY_NAME[family])


def flat(values: Tensor, skip: int) -> Tensor:
    """Values `[..., width]` as float64 `[tokens, width]`, less the first `skip` tokens of every window."""
    return values.double().reshape(-1, WINDOW, values.shape[-1])[:, skip:].flatten(0, 1)


@pytest.mark.parametrize("needs", [Stat.GRAM, Stat.GRAM | Stat.DRIFT])
def test_no_probe_unless_asked_for(needs, monkeypatch):
    """Where nobody asks for the lag there is none, and blocks are not probed."""
    monkeypatch.setattr(taps, "trace", lambda *_: pytest.fail("was called"))
    for step in walk(TinyModel().load("llama"), random_windows(), needs, sequential=True):
        assert all(stats.lag is None for stats in step.stats.values())
