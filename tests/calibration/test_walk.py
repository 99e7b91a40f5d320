"""Laws of the walk: every block sees what a plain forward pass of the partly pruned model would show it."""

import gc
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from nmbench.calibration.paused_forward import PausedForward
from nmbench.calibration.trial import writing_blocks
from nmbench.calibration.walk import BATCH_TOKENS, GPU_BATCH_NUMBERS, batch_tokens, walk
from nmbench.errors import NMBenchError, NumericalFailure
from nmbench.methods import LayerStats, Stat
from nmbench.models.bundle import Bundle, Layer
from nmbench.models.dense_weights import DenseWeights
from nmbench.pattern import Pattern
from nmbench_plugins.tiny import FAMILIES, TinyModel
from reference import one_shot
from reference.tiers import tiered

BOTH = Stat.INPUT_NORM | Stat.GRAM
ALL = BOTH | Stat.DRIFT | Stat.LAG
WINDOW = 24  # longer than the sliding windows of the tiny models
FUSED = {"mixtral", "qwen3moe"}
families = pytest.mark.parametrize("family", sorted(FAMILIES))


def unrouted_ways(fast):
    """Families without experts, walked in both ways."""
    return pytest.mark.parametrize(
        ("family", "sequential"), tiered(sorted(FAMILIES.keys() - FUSED), [False, True], fast=fast)
    )


def load(family: str = "llama") -> Bundle:
    return TinyModel().load(family)


def random_windows(count: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(256, (count, WINDOW), generator=torch.Generator().manual_seed(seed))


def flat(values: Tensor, skip: int = 0) -> Tensor:
    """Values `[..., width]` as float64 `[tokens, width]`, less the first `skip` tokens of every window."""
    if not skip:
        return values.double().flatten(0, -2)
    whole = values.double().reshape(-1, WINDOW, values.shape[-1])  # OPT flattens what it gives its last layers itself
    return whole[:, skip:].flatten(0, 1)


def expected(inputs: Tensor, windows: int, dense: Tensor | None = None, skip: int = 0) -> LayerStats:
    """Statistics of inputs `[..., in]`, and of their drift from those in the dense model, in float64."""
    x = flat(inputs, skip)
    norm = (x.square().sum(0) / windows).sqrt()
    drift = None if dense is None else 2 / windows * (flat(dense, skip) - x).T @ x
    return LayerStats(windows, len(x), norm, 2 / windows * x.T @ x, drift)


def assert_close(got: LayerStats, wanted: LayerStats) -> None:
    assert (got.windows, got.tokens) == (wanted.windows, wanted.tokens)
    torch.testing.assert_close(got.input_norm.double(), wanted.input_norm, rtol=1e-5, atol=1e-6)
    scale = float(wanted.gram.abs().max())
    torch.testing.assert_close(got.gram.double(), wanted.gram, rtol=1e-4, atol=1e-5 * scale)
    assert (got.drift is None) == (wanted.drift is None)
    if wanted.drift is not None:
        torch.testing.assert_close(got.drift.double(), wanted.drift, rtol=1e-4, atol=1e-5 * scale)


def differ(a: Tensor, b: Tensor) -> bool:
    """Whether inputs differ by more than rounding; experts may be given another number of tokens."""
    return a.shape != b.shape or not torch.allclose(a, b, atol=1e-6)


def halve(layer: Layer) -> None:
    layer.write(torch.where(Pattern(2, 4).top(layer.read().abs()), layer.read(), 0.0))


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def surroundings(bundle: Bundle) -> tuple:
    """Everything a walk might leave changed besides the weights."""
    return (
        hooks_of(bundle.model),
        getattr(bundle.model.config, "use_cache", None),
        [module.training for module in bundle.model.modules()],
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        torch.backends.cuda.matmul.allow_tf32,
        [name for name, module in bundle.model.named_modules() if "forward" in vars(module)],
    )


def alive() -> int:
    """The number of forward passes that are paused somewhere."""
    return sum(issubclass(type(it), PausedForward) and bool(it) for it in gc.get_objects())


class Eavesdropper:
    """Collects what the blocks are called with, for as long as the test lasts."""

    def __init__(self, bundle: Bundle) -> None:
        self.heard: dict[str, list[Tensor]] = {name: [] for name in bundle.blocks}
        for name, block in bundle.blocks.items():
            block.register_forward_pre_hook(self.listener(name), with_kwargs=True)

    def listener(self, name: str):
        return lambda module, args, kwargs: self.heard[name].append(
            (args[0] if args else kwargs["hidden_states"]).clone()
        )


# What the blocks see


@families
def test_block_inputs_of_the_walk(family):
    """Walking without pruning, every block is given, bit for bit, the inputs of a plain forward pass."""
    bundle, windows = load(family), random_windows()
    plain = one_shot.inputs(bundle.model, bundle.blocks, windows)
    observer = Eavesdropper(bundle)
    for step, name in zip(walk(bundle, windows, Stat.INPUT_NORM), bundle.blocks, strict=True):
        assert torch.equal(observer.heard[name][-1], plain[name]), step.index


@families
def test_statistics_of_the_dense_model(family):
    """Walking without pruning, the statistics are those of a plain forward pass, summed up in float64."""
    bundle, windows = load(family), random_windows()
    plain = one_shot.inputs(bundle.model, bundle.layers, windows)
    steps = list(walk(bundle, windows, BOTH))
    assert [step.index for step in steps] == [0, 1]
    stats = {name: got for step in steps for name, got in step.stats.items()}
    assert stats.keys() == bundle.layers.keys()
    for name, got in stats.items():
        assert_close(got, expected(plain[name], len(windows)))


@families
def test_statistics_below_a_pruned_block(family):
    """At every block the walk sees what a plain forward pass of the model, partly pruned as it is then, shows."""
    bundle, windows = load(family), random_windows()
    dense = one_shot.inputs(bundle.model, bundle.layers, windows)
    for step in walk(bundle, windows, BOTH):
        plain = one_shot.inputs(bundle.model, step.stats, windows)
        for layer in step.layers:
            assert_close(step.stats[layer.name], expected(plain[layer.name], len(windows)))
            changed = differ(plain[layer.name], dense[layer.name])
            assert changed == (step.index > 0)
        for layer in step.layers:
            halve(layer)


@unrouted_ways(fast=lambda family, sequential: family in ("llama", "opt"))
def test_first_tokens_are_left_out(family, sequential):
    """Skipped tokens run through the blocks, but nothing is known of them in any statistic."""
    bundle, windows = load(family), random_windows()
    dense = one_shot.inputs(bundle.model, bundle.layers, windows)
    for step in walk(bundle, windows, ALL, sequential, skip_tokens=3):
        plain = one_shot.inputs(bundle.model, step.stats, windows)
        for name, got in step.stats.items():
            assert_close(got, expected(plain[name], len(windows), dense[name], skip=3))
        for layer in step.layers:
            halve(layer)


@unrouted_ways(fast=lambda family, sequential: sequential or family in ("llama", "gptneox"))
def test_drift_from_the_dense_model(family, sequential):
    """The drift is that of a layer's inputs in the partly pruned model from its inputs in the dense one."""
    bundle, windows = load(family), random_windows()
    dense = one_shot.inputs(bundle.model, bundle.layers, windows)
    for step in walk(bundle, windows, ALL, sequential):
        plain = one_shot.inputs(bundle.model, step.stats, windows)
        for name, got in step.stats.items():
            assert_close(got, expected(plain[name], len(windows), dense[name]))
        if step.index == 0 and not sequential:
            assert not any(stats.drift.any() for stats in step.stats.values())
        for layer in step.layers:
            halve(layer)


@unrouted_ways(fast=lambda family, sequential: family in ("llama", "gptneox", "opt"))
def test_walking_a_pruned_model(family, sequential):
    """A pruned model is walked as it is, next to the dense one that the caller knows, and left as it was."""
    bundle, windows = load(family), random_windows()
    dense = one_shot.inputs(bundle.model, bundle.layers, windows)
    weights = {name: layer.read().clone() for name, layer in bundle.layers.items()}
    for layer in bundle.layers.values():
        halve(layer)
    plain, digest = one_shot.inputs(bundle.model, bundle.layers, windows), bundle.digest()
    for step in walk(bundle, windows, ALL, sequential, original=lambda layer: weights[layer.name]):
        for name, got in step.stats.items():
            assert_close(got, expected(plain[name], len(windows), dense[name]))
    assert bundle.digest() == digest


@families
def test_starting_at_a_later_block(family):
    """A walk that starts at a block sees there what one from the beginning sees."""
    bundle, windows = load(family), random_windows()
    original = {name: layer.read().clone() for name, layer in bundle.layers.items()}
    for layer in bundle.block_layers(0):
        halve(layer)
    whole, rest = (
        list(walk(bundle, windows, ALL, original=lambda layer: original[layer.name], start=start)) for start in (0, 1)
    )
    assert [step.index for step in rest] == [1]
    for name, got in rest[0].stats.items():
        assert torch.equal(got.gram, whole[1].stats[name].gram)
        assert torch.equal(got.drift, whole[1].stats[name].drift)


@families
def test_statistics_of_a_sequential_walk(family):
    """At every step of a sequential walk the layers before are pruned, and every layer has its turn once."""
    bundle, windows = load(family), random_windows()
    dense = one_shot.inputs(bundle.model, bundle.layers, windows)
    visited = []
    for step in walk(bundle, windows, BOTH, sequential=True):
        plain = one_shot.inputs(bundle.model, step.stats, windows)
        for layer in step.layers:
            assert_close(step.stats[layer.name], expected(plain[layer.name], len(windows)))
            changed = differ(plain[layer.name], dense[layer.name])
            assert changed or not visited or family == "gptneox"  # whose MLP reads what its attention reads
            halve(layer)
        visited += [layer.name for layer in step.layers]
        assert step.last == ({layer.name for layer in bundle.block_layers(step.index)} <= set(visited))
    assert sorted(visited) == sorted(bundle.layers)


@pytest.mark.parametrize(
    ("family", "turns"),
    [
        ("llama", ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"]),
        ("gemma2", ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"]),
        ("phi3", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
        ("gpt2", ["c_attn", "c_proj", "c_fc", "c_proj"]),
        ("gptneox", ["query_key_value dense_h_to_4h", "dense", "dense_4h_to_h"]),  # two norms of equal weights
        ("opt", ["q_proj k_proj v_proj", "out_proj", "fc1", "fc2"]),
        (
            "mixtral",
            [
                "q_proj k_proj v_proj",
                "o_proj",
                "gate_up_proj[0] gate_up_proj[1] gate_up_proj[2] gate_up_proj[3]",
                "down_proj[0] down_proj[1] down_proj[2] down_proj[3]",
            ],
        ),
    ],
)
def test_turns_of_a_sequential_walk(family, turns):
    """Layers take turns in the order of execution, those with the same inputs together."""
    steps = list(walk(load(family), random_windows(), BOTH, sequential=True))
    found = [sorted(layer.name.split(".")[-1] for layer in step.layers) for step in steps]
    assert found == 2 * [sorted(turn.split()) for turn in turns]
    assert [step.index for step in steps] == [0] * len(turns) + [1] * len(turns)


def test_blocks_without_layers_are_walked_as_well():
    """A block that is left dense altogether is one empty step, and passes on what the blocks below are given."""
    windows, part = random_windows(), load().without(["layers.0.*"])
    for sequential in (False, True):
        steps = list(walk(part, windows, ALL, sequential))
        assert [layer for step in steps if step.index == 0 for layer in step.layers] == []
        plain = one_shot.inputs(part.model, part.layers, windows)
        for name, got in {n: s for step in steps for n, s in step.stats.items()}.items():
            assert_close(got, expected(plain[name], len(windows), plain[name]))


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("needs", [BOTH, ALL])
def test_tokens_are_counted(needs, sequential):
    """The tokens of all steps are those that went through the blocks, those kept dense included.

    What the last block makes of its pruned weights nobody needs: it is neither run nor counted.
    """
    bundle, windows, told = load(), random_windows(), []
    for block in bundle.blocks.values():
        block.register_forward_pre_hook(
            lambda module, args, kwargs: told.append(args[0].shape[:2].numel()), with_kwargs=True
        )
    writing_blocks(bundle, windows)
    told.clear()
    steps = list(walk(bundle, windows, needs, sequential))
    known = windows.numel() if needs is ALL else 0  # the dense pass goes on with the output that it had before
    assert sum(step.block_tokens for step in steps) == sum(told) - known


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_batches_are_larger_on_a_gpu(family):
    """Where the model is narrow a GPU is given more tokens at once than a CPU, but not without limit."""
    bundle, gpu = load(family), torch.device("cuda")
    assert batch_tokens(bundle, torch.device("cpu")) == BATCH_TOKENS
    assert BATCH_TOKENS < batch_tokens(bundle, gpu) <= GPU_BATCH_NUMBERS // 64
    wide = SimpleNamespace(layers={"a": SimpleNamespace(shape=(8, 8192))})
    assert batch_tokens(wide, gpu) == BATCH_TOKENS


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_batches_do_not_matter(family):
    """Statistics are the same to rounding whether windows are walked one by one, in odd batches or all together."""
    bundle, windows = load(family), random_windows(7)
    dense, results = DenseWeights(bundle), []
    for batch in (1, 3, 7):
        stats: dict[str, LayerStats] = {}
        for step in walk(bundle, windows, BOTH, tokens_at_once=batch * WINDOW):
            stats.update(step.stats)
            for layer in step.layers:
                halve(layer)
        dense.restore()
        results.append(stats)
    for other in results[1:]:
        for name, got in other.items():
            assert got.windows == 7
            torch.testing.assert_close(got.input_norm, results[0][name].input_norm, rtol=1e-4, atol=1e-6)
            scale = float(got.gram.abs().max())
            torch.testing.assert_close(got.gram, results[0][name].gram, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize(("needs", "norm", "gram"), [(Stat.INPUT_NORM, True, False), (Stat.GRAM, False, True)])
def test_only_what_was_asked_for(needs, norm, gram):
    """A statistic that nobody asked for is not gathered."""
    for step in walk(load(), random_windows(1), needs):
        for stats in step.stats.values():
            assert (stats.input_norm is not None, stats.gram is not None) == (norm, gram)


def test_skipped_layers_are_not_listened_to():
    """Layers left dense by the user have no statistics, and the others the same as before."""
    windows = random_windows()
    whole = {n: s for step in walk(load(), windows, BOTH) for n, s in step.stats.items()}
    part = {n: s for step in walk(load().without(["mlp.*"]), windows, BOTH) for n, s in step.stats.items()}
    assert part.keys() == {name for name in whole if ".mlp." not in name}
    assert all(torch.equal(part[name].gram, whole[name].gram) for name in part)


# What the walk leaves behind


@pytest.mark.parametrize(
    ("family", "sequential"),
    tiered(sorted(FAMILIES), [False, True], fast=lambda family, sequential: sequential or family == "llama"),
)
def test_walk_leaves_no_trace(family, sequential):
    """After a walk, hooks, cache flag, training flags, random state and weights are what they were."""
    bundle = load(family)
    before, digest = surroundings(bundle), bundle.digest()
    for _ in walk(bundle, random_windows(), ALL, sequential):
        assert hooks_of(bundle.model) == before[0]
        assert torch.is_grad_enabled() == before[4]
    assert surroundings(bundle) == before
    assert bundle.digest() == digest


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("needs", [BOTH, ALL])
@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("tried", [True, False])
def test_no_trace_after_an_exception_in_a_block(tried, block, needs, sequential):
    """When a block raises in the middle of a walk, hooks, flags and random state are restored all the same."""
    bundle = load()

    def fail(module: nn.Module, args: tuple) -> None:
        raise OSError("out of luck")

    if tried:
        writing_blocks(bundle, random_windows())
    bundle.layers[f"model.layers.{block}.mlp.down_proj"].module.register_forward_pre_hook(fail)
    before = surroundings(bundle)
    with pytest.raises(OSError, match="out of luck"):
        list(walk(bundle, random_windows(), needs, sequential, tokens_at_once=2 * WINDOW))
    assert surroundings(bundle) == before
    assert alive() == 0


def test_no_trace_when_the_walk_is_abandoned():
    """A walk that its caller leaves after the first block leaves nothing behind."""
    bundle = load()
    before = surroundings(bundle)
    steps = walk(bundle, random_windows(), BOTH)
    next(steps)
    assert alive() > 0
    steps.close()
    assert surroundings(bundle) == before
    assert alive() == 0


# What is refused


@pytest.mark.parametrize("skip", [-1, WINDOW, 1000])
def test_nothing_left_of_a_window(skip):
    """Windows that are skipped altogether are refused, with both lengths, before anything runs."""
    with pytest.raises(NMBenchError, match=f"skip_tokens is {skip}, but calibration windows have {WINDOW} tokens"):
        next(walk(load(), random_windows(), BOTH, skip_tokens=skip))


def test_broken_embeddings_are_named():
    """NaN that comes in with the tokens is reported with the first layer that was given it, and leaves no hook."""
    bundle, windows = load(), random_windows()
    bundle.model.get_input_embeddings().weight[windows[3, 5]] = torch.nan
    with pytest.raises(NumericalFailure, match=r"inputs of layer model\.layers\.0\.self_attn\.q_proj hold NaN"):
        list(walk(bundle, windows, Stat.INPUT_NORM))
    assert hooks_of(bundle.model) == 0


@pytest.mark.parametrize("needs", [Stat.INPUT_NORM, Stat.GRAM])
def test_inputs_broken_half_way_are_named(needs):
    """Infinite values that arise inside a block are reported with the first layer they reach."""
    bundle = load()
    bundle.layers["model.layers.1.mlp.up_proj"].read().fill_(torch.inf)
    seen = []
    with pytest.raises(NumericalFailure, match=r"inputs of layer model\.layers\.1\.mlp\.down_proj hold NaN or inf"):
        seen.extend(step.index for step in walk(bundle, random_windows(), needs))
    assert seen == [0]


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("needs", [Stat.INPUT_NORM, Stat.GRAM])
def test_layers_that_no_token_reached_are_named(needs, sequential):
    """A layer that calibration never ran through is neither zeroed nor left dense in silence: it is an error."""
    model = TinyModel().load("llama").model
    model.model.layers[1].mlp.expert = nn.Linear(64, 64, bias=False)
    bundle = Bundle.of("acme", model, None)
    assert "model.layers.1.mlp.expert" in bundle.layers
    with pytest.raises(NMBenchError, match=r"no calibration token reached layer model.*\.mlp\.expert; .* --skip"):
        list(walk(bundle, torch.arange(64).view(2, 32), needs, sequential))
    list(walk(bundle.without(["expert"]), torch.arange(64).view(2, 32), needs))
