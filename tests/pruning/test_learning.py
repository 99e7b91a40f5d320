"""Laws of the task of a mask learner: changes are undone, tokens counted, masks checked, counters resumed."""

import functools
import itertools
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmbench.errors import NMBenchError, NotStrict
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.pattern import Pattern
from nmbench.pruning.learning import COUNTERS, LearnTask, OnReport
from nmbench.pruning.live_weights import LiveWeights, masked
from nmbench.results.files import MemoryCheckpoints
from nmbench.runtime.cost import Cost, Spent
from nmbench_plugins.tiny import TinyModel

TWO_FOUR = Pattern(2, 4)
families = pytest.mark.parametrize("family", ["llama", "gpt2"])
quick = settings(max_examples=20, deadline=None)


@functools.cache
def load(family: str) -> tuple[Bundle, DenseWeights]:
    bundle = TinyModel().load(family)
    return bundle, DenseWeights(bundle)


def random_windows(count: int, length: int = 8, seed: int = 0) -> Tensor:
    return torch.randint(256, (count, length), generator=torch.Generator().manual_seed(seed))


def make(
    family: str = "llama",
    pool: int = 10,
    length: int = 8,
    store: MemoryCheckpoints | None = None,
    on_report: OnReport = lambda *event: None,
) -> LearnTask:
    bundle, dense = load(family)
    masks = {name: TWO_FOUR.top(layer.read().abs()) for name, layer in bundle.layers.items()}
    patterns = dict.fromkeys(bundle.layers, TWO_FOUR)
    windows, selection = random_windows(pool, length), random_windows(4, length, 1)
    store = store or MemoryCheckpoints()
    return LearnTask(bundle, dense, patterns, masks, windows, selection, 0, store, "acme", on_report)


def other_masks(task: LearnTask) -> dict[str, Tensor]:
    return {name: ~mask for name, mask in task.initial.items()}


def assert_masked(task: LearnTask, masks: dict[str, Tensor]) -> None:
    for name, mask in masks.items():
        live = task.bundle.layers[name].read()
        assert torch.equal(live, torch.where(mask, task.dense[name], 0.0))
        assert not live[~mask].signbit().any()


# Live weights


@families
def test_masked_weights(family):
    """Inside the context the weights have the initial masks, then any others applied; afterwards they are dense."""
    task, dense = make(family), load(family)[1]
    with task.masked_weights() as live:
        assert_masked(task, task.initial)
        live.apply(other_masks(task))
        assert_masked(task, other_masks(task))
        first = next(iter(task.layers))
        live.apply({first: task.initial[first]})
        assert_masked(task, {**other_masks(task), first: task.initial[first]})
    assert task.bundle.digest() == dense.digest


@families
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_masked_weights_after_an_exception(family, error):
    """However the context is left, whatever was written into live weights, the dense weights are back."""
    task, dense = make(family), load(family)[1]
    with pytest.raises(error):
        spoil(task, error)
    assert task.bundle.digest() == dense.digest


def spoil(task: LearnTask, error: type[BaseException]) -> None:
    with task.masked_weights() as live:
        live[next(iter(task.layers))].fill_(torch.nan)
        task.model.get_input_embeddings().weight.zero_()
        raise error


@families
def test_dense_and_initial_stay(family):
    """Masking live weights changes neither the dense copies nor the initial masks."""
    task = make(family)
    dense = {name: weight.clone() for name, weight in task.dense.items()}
    with task.masked_weights() as live:
        live.apply(other_masks(task))
    assert all(torch.equal(task.dense[name], weight) for name, weight in dense.items())
    assert all(torch.equal(mask, TWO_FOUR.top(dense[name].abs())) for name, mask in task.initial.items())


@families
def test_loss_is_that_of_the_masked_model(family):
    """The loss of a task is that of a model whose weights were zeroed by hand."""
    task, tokens = make(family), random_windows(3)
    plain = TinyModel().load(family)
    for name, layer in plain.layers.items():
        layer.write(layer.read() * task.initial[name])
    logits = plain.model(input_ids=tokens).logits.double()
    targets = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    with task.masked_weights():
        torch.testing.assert_close(task.loss(tokens).double(), -targets.mean(1), rtol=1e-5, atol=1e-5)


@families
def test_live_weights_are_dense(family):
    """Opened without masks, the live weights are the dense ones; what was done to them is undone."""
    task, dense = make(family), load(family)[1]
    name = next(iter(task.layers))
    with task.live_weights() as live:
        assert task.bundle.digest() == dense.digest
        live.apply({name: task.initial[name]})
        assert torch.equal(live[name], torch.where(task.initial[name], task.dense[name], 0.0))
    assert task.bundle.digest() == dense.digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_masking_is_where(dtype, rows):
    """Masking, in whatever parts and memory, keeps every bit of the kept weights and leaves +0.0 elsewhere."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(1024, rows, generator=generator).to(dtype).t()
    mask = torch.rand(rows, 1024, generator=generator) < 0.5
    for dense in (weight, weight.contiguous()):
        out = torch.full_like(dense, torch.nan)
        masked(dense, mask, out)
        assert torch.equal(out, torch.where(mask, dense, 0.0))
        assert not out[~mask].signbit().any()


# Provided weights


@families
def test_provided_weights_are_computed_with(family):
    """Layers compute with the weights provided, each asked for once, in the model's order, and live weights stay."""
    task, dense, tokens = make(family), load(family)[1], random_windows(3)
    with task.masked_weights():
        wanted = task.loss(tokens)
    asked = []

    def provider(name):
        asked.append(name)
        return task.dense[name].masked_fill(~task.initial[name], 0.0)

    with task.live_weights() as live:
        with live.provided(provider):
            losses = task.loss(tokens)
            assert task.bundle.digest() == dense.digest
        torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
        assert sorted(asked) == sorted(task.layers)
        assert not torch.equal(task.loss(tokens), losses)  # dense again


def test_layers_keep_their_bias():
    """A layer that computes with a provided weight still adds its bias."""
    bundle = TinyModel().load("gpt2")
    layer = next(iter(bundle.layers.values()))
    rows, inputs = layer.shape
    layer.module.bias.copy_(torch.linspace(-1, 1, rows))  # it starts at 0
    with LiveWeights(bundle, {}).provided(lambda name: torch.ones(bundle.layers[name].shape)):
        output = layer.module(torch.full((3, 5, inputs), 2.0))
    torch.testing.assert_close(output, (2.0 * inputs + layer.module.bias).expand(3, 5, rows))


@families
def test_one_buffer_serves_all_layers(family):
    """A provided weight may be overwritten as soon as its layer is done."""
    task, tokens = make(family), random_windows(3)
    scratch = torch.empty(max(rows * inputs for rows, inputs in task.layers.values()))

    def provider(name):
        return scratch[: task.dense[name].numel()].view(task.layers[name]).copy_(task.dense[name])

    with task.live_weights() as live:
        wanted = task.loss(tokens)
        with live.provided(provider):
            torch.testing.assert_close(task.loss(tokens), wanted, rtol=1e-5, atol=1e-5)


@families
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_provided_weights_after_an_exception(family, error):
    """However the context is left, the layers compute with their own weights again, also those with other forwards."""
    task = make(family)
    layers = [layer.module for layer in task.bundle.layers.values()]
    layers[0].forward = before = layers[0].forward  # as a library that patches modules leaves it

    def provider(name):
        raise error

    try:
        with task.live_weights() as live, pytest.raises(error), live.provided(provider):
            task.loss(random_windows(1))
        assert layers[0].forward is before
        assert not any("forward" in vars(module) for module in layers[1:])
    finally:
        del layers[0].forward


# Tokens


@quick
@given(st.integers(1, 12), st.integers(1, 15), st.integers(0, 5))
def test_fixed_order(pool, size, start):
    """Without a generator, minibatches run through the pool in order, round and round, from any start."""
    endless = itertools.cycle(range(pool))
    size_used = min(size, pool)
    wanted = [[next(endless) for _ in range(size_used)] for _ in range(start + 4)][start:]
    task = make(pool=pool)
    got = list(itertools.islice(task.batches(size, start=start), 4))
    assert [batch.chosen.tolist() for batch in got] == wanted
    assert all(torch.equal(batch.tokens, task.pool[batch.chosen]) for batch in got)


@quick
@given(st.integers(1, 12), st.integers(1, 15), st.integers(0, 2**31))
def test_random_order(pool, size, seed):
    """With a generator, a minibatch never repeats a window, and the generator's state is all it takes to go on."""
    task, generator = make(pool=pool), torch.Generator().manual_seed(seed)
    batches = task.batches(size, generator)
    next(batches)
    state = generator.get_state()
    second = next(batches)
    assert len(set(second.chosen.tolist())) == len(second.chosen) == min(size, pool)
    assert torch.equal(second.tokens, task.pool[second.chosen])
    again = next(make(pool=pool).batches(size, torch.Generator().set_state(state)))
    assert torch.equal(again.chosen, second.chosen)


def test_random_order_reaches_the_whole_pool():
    """Random minibatches deal every window in time, so that the order is not a fixed subset."""
    task = make(pool=10)
    seen = {i for batch in itertools.islice(task.batches(3, task.generator), 40) for i in batch.chosen.tolist()}
    assert seen == set(range(10))


@quick
@given(st.integers(1, 6), st.integers(2, 20), st.integers(2, 24))
def test_shorter_windows(pool, length, asked):
    """Shorter windows are consecutive pieces of the pool's windows, none straddling two; longer ones are refused."""
    task = make(pool=pool, length=length)
    assert task.windows() is task.pool
    if asked > length:
        with pytest.raises(NMBenchError, match=f"acme asks for windows of {asked} tokens, the pool has {length}"):
            task.windows(asked)
        return
    pieces = [row[i : i + asked] for row in task.pool.tolist() for i in range(0, length - asked + 1, asked)]
    assert task.windows(asked).tolist() == pieces


# Counters


@quick
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 12))
def test_unique_tokens(pool, size, steps):
    """Unique tokens are the tokens of the distinct windows used, however often each window was used."""
    task = make(pool=pool)
    dealt = [i for batch in itertools.islice(task.batches(size), steps) for i in batch.chosen.tolist()]
    assert task.settle().unique_tokens == 8 * len(set(dealt))


@quick
@given(
    st.lists(st.tuples(st.integers(2, 8), st.integers(1, 9), st.booleans()), min_size=1, max_size=4), st.integers(1, 9)
)
def test_unique_tokens_of_several_lengths(asked, steps):
    """Iterators of several window lengths, alive at once, count every distinct token of the pool once."""
    task = make(pool=6, length=8)
    alive = [
        (length, task.batches(size, task.generator if drawn else None, task.windows(length)))
        for length, size, drawn in asked
    ]
    seen = set()
    for _ in range(steps):
        for length, batches in alive:
            per_window = 8 // length
            for index in next(batches).chosen.tolist():
                begin = index // per_window * 8 + index % per_window * length
                seen |= set(range(begin, begin + length))
    assert task.settle().unique_tokens == len(seen)


def test_unique_tokens_of_other_windows():
    """Windows that are not the pool's count by themselves."""
    task = make(pool=6, length=8)
    next(task.batches(2, windows=task.pool[:2]))
    next(task.batches(2, windows=task.pool.flip(0)[:2]))
    assert task.settle().unique_tokens == 32


def test_forward_and_backward_tokens():
    """Every token that goes forward counts, and backward only those whose gradient is taken."""
    task, tokens = make(), random_windows(3)
    with torch.no_grad():
        task.loss(tokens)
    assert task.settle() == Cost(forward_tokens=24)
    weight = task.model.get_output_embeddings().weight.requires_grad_()
    try:
        task.loss(tokens)
        assert task.settle() == Cost(forward_tokens=48)
        task.loss(tokens[:2]).sum().backward()
    finally:
        weight.requires_grad_(False)
        gradient, weight.grad = weight.grad, None
    assert gradient.abs().sum() > 0
    assert task.settle() == Cost(forward_tokens=64, backward_tokens=16)


def test_tokens_computed_elsewhere_are_counted():
    """A learner that calls the model by itself says so, and its tokens count like the others."""
    task = make()
    task.count_forward(30)
    task.loss(random_windows(2))
    assert task.settle() == Cost(forward_tokens=46)


def test_reading_the_selection_is_recorded():
    """The held-out windows count as selection tokens once they are read, once for any number of reads."""
    task = make()
    assert task.cost.selection_tokens == 0
    assert torch.equal(task.selection, task.selection)
    assert task.cost.selection_tokens == 32


def test_processor_seconds_of_an_older_checkpoint_are_unknown():
    """A checkpoint without processor seconds makes those of the whole job unknown; the wall-clock seconds are known."""
    store = MemoryCheckpoints()
    make(store=store).checkpoints.save({"step": 7})
    state = store.load()
    del state[COUNTERS]["cpu_seconds"]
    store.save(state)
    again = make(store=store)
    again.checkpoints.load()
    assert again.checkpoints.earlier.seconds > 0 and again.checkpoints.earlier.cpu_seconds is None
    assert (again.checkpoints.earlier + Spent(1.0, 1.0)).cpu_seconds is None


def test_counters_resume_with_the_checkpoint():
    """A checkpoint gives back what was saved, and the counters as they were then, whatever happened in between."""
    store = MemoryCheckpoints()
    task = make(store=store)
    assert task.checkpoints.load() is None
    next(task.batches(3))
    task.loss(random_windows(2))
    task.checkpoints.save({"step": 7, "logits": torch.arange(3.0)})
    saved = asdict(task.settle())
    again = make(store=store)
    next(again.batches(9))
    again.loss(random_windows(5))
    state = again.checkpoints.load()
    assert state.keys() == {"step", "logits"}
    assert state["step"] == 7
    assert torch.equal(state["logits"], torch.arange(3.0))
    assert asdict(again.settle()) == saved == {**asdict(Cost()), "forward_tokens": 16, "unique_tokens": 24}
    assert again.checkpoints.earlier.seconds > 0
    assert again.checkpoints.earlier.cpu_seconds > 0
    next(again.batches(3, start=1))
    assert again.settle().unique_tokens == 48


# Reports


def test_reports_reach_the_host():
    """Reports of learning steps and of other stages reach the host with their figures."""
    told = []
    task = make(on_report=lambda *event: told.append(event))
    task.report(3, loss=1.5)
    task.progress("warm up", 1, 2)
    assert told == [("learn", 3, None, {"loss": 1.5}), ("warm up", 1, 2, {})]


@pytest.mark.parametrize("spoil", ["flip", "missing", "float"])
def test_reported_masks_are_checked(spoil):
    """Masks that are reported are checked at once: good ones pass, others are refused with the learner's name."""
    task = make()
    masks = {name: mask.clone() for name, mask in task.initial.items()}
    task.report(1, masks=masks)
    name = "model.layers.0.mlp.up_proj"
    if spoil == "flip":
        masks[name][2, 5] ^= True
    elif spoil == "missing":
        del masks[name]
    else:
        masks[name] = masks[name].float()
    with pytest.raises(NotStrict, match=rf"^acme .*{name}"):
        task.report(2, masks=masks)


def test_generator_is_seeded():
    """The task's generator depends on the seed only."""
    assert torch.equal(make().generator.get_state(), make("gpt2").generator.get_state())


# Layers that no provided weight can stand in for


class Scaled(torch.nn.Linear):
    """A layer that does more than multiply by its weight."""

    def forward(self, input):
        return 2 * super().forward(input)


def read_elsewhere(module):
    """Let the block of a layer read the layer's weight besides calling the layer."""
    module.register_forward_hook(lambda layer, args, output: output + args[0] @ layer.weight.t())


def scaled(module):
    module.__class__ = Scaled


@pytest.mark.parametrize("change", [read_elsewhere, scaled])
def test_provided_weights_are_proven(change):
    """A layer that a provided weight cannot stand in for is named, and its weight is as before."""
    bundle = TinyModel().load("llama")
    digest, name = bundle.digest(), "model.layers.1.self_attn.o_proj"
    change(bundle.layers[name].module)
    probe = random_windows(1)[:, :16]
    live = LiveWeights(bundle, {}, probe)
    assert live.obstacle.startswith(f"{name} does more than multiply by its weight, or its weight is read elsewhere")
    with pytest.raises(NMBenchError, match="choose a learner that writes its masks"):
        live.provided(lambda name: live[name]).__enter__()
    assert bundle.digest() == digest


@families
def test_provided_weights_of_every_family(family):
    """Layers that only multiply by their weights pass the proof, which changes nothing."""
    bundle, dense = load(family)
    assert LiveWeights(bundle, {}, random_windows(1)[:, :16]).obstacle is None
    assert bundle.digest() == dense.digest
