"""Laws of paused forward passes: however a model joins its blocks, they are given what a plain forward pass gives."""

import pytest
import torch
from torch import Tensor, nn

from nmbench.calibration.paused_forward import go_on, paused_forwards
from nmbench.calibration.trial import alike, writing_blocks
from nmbench.calibration.walk import walk
from nmbench.errors import NMBenchError
from nmbench.methods import Stat
from nmbench.models.bundle import Bundle, Layer
from nmbench.pattern import Pattern
from nmbench_plugins.tiny import FAMILIES, TinyModel
from reference import one_shot
from reference.toys import FORMS, Block, Toy, each, plain, straight, toy, within

WINDOW = 12
ALL = Stat.INPUT_NORM | Stat.GRAM | Stat.DRIFT | Stat.LAG


forms = pytest.mark.parametrize("form", FORMS)


def random_windows(count: int = 5) -> Tensor:
    return torch.randint(64, (count, WINDOW), generator=torch.Generator().manual_seed(0))


def halve(layer: Layer) -> None:
    layer.write(torch.where(Pattern(2, 4).top(layer.read().abs()), layer.read(), 0.0))


def flat(values: Tensor) -> Tensor:
    return values.double().flatten(0, -2)


@forms
@pytest.mark.parametrize("sequential", [False, True])
def test_statistics_of_awkward_models(form, sequential):
    """The statistics are those of plain forward passes of the model as it is then, and of the dense model."""
    bundle, windows = toy(form), random_windows()
    dense, visited = one_shot.inputs(bundle.model, bundle.layers, windows), []
    for step in walk(bundle, windows, ALL, sequential, tokens_at_once=2 * WINDOW):
        now = one_shot.inputs(bundle.model, step.stats, windows)
        for name, got in step.stats.items():
            x, y = flat(now[name]), flat(dense[name])
            scale = 1e-5 * float((2 / 5 * x.T @ x).abs().max())
            torch.testing.assert_close(got.gram.double(), 2 / 5 * x.T @ x, rtol=1e-4, atol=scale)
            torch.testing.assert_close(got.drift.double(), 2 / 5 * (y - x).T @ x, rtol=1e-3, atol=scale)
            assert bool((y - x).abs().max() > 1e-3) == (step.index > 0 or (sequential and "two" in name))
        visited += step.stats
        for layer in step.layers:
            halve(layer)
    assert sorted(visited) == sorted(bundle.layers)


@torch.no_grad()
def end_of(bundle: Bundle, windows: Tensor) -> list[Tensor]:
    """Prune a model while passes wait; their outputs, in the order of the batches."""
    ends: list[Tensor] = []
    handle = bundle.model.register_forward_hook(lambda model, args, output: ends.append(output))
    writing = writing_blocks(bundle, windows)
    ends.clear()
    with paused_forwards(bundle, windows.split(2), writing) as passes:
        for index, block in enumerate(bundle.blocks.values()):
            for forward in passes:
                forward.again(block)
            for layer in bundle.block_layers(index):
                halve(layer)
            go_on(bundle, passes)
    handle.remove()
    return ends


@forms
@torch.no_grad()
def test_ends_of_awkward_models(form):
    """The outputs of the passes are, bit for bit, those of the pruned model."""
    bundle, windows = toy(form), random_windows()
    ends = end_of(bundle, windows)
    assert len(ends) == 3
    assert all(torch.equal(end, bundle.model(part)) for end, part in zip(ends, windows.split(2), strict=True))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_ends_of_architectures(family):
    """The logits of the passes are, bit for bit, those of the pruned model."""
    bundle, windows = TinyModel().load(family), random_windows()
    ends = end_of(bundle, windows)
    assert len(ends) == 3
    for end, part in zip(ends, windows.split(2), strict=True):
        assert torch.equal(end.logits, bundle.model(part).logits)


@torch.no_grad()
def test_inputs_of_each_layer_of_their_own():
    """Gemma 4's blocks are given inputs made from the tokens: every batch has its own."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("needs a transformers that knows Gemma 4")
    config = transformers.Gemma4TextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        pad_token_id=0,
    )
    bundle = Bundle.of("it", transformers.AutoModelForCausalLM.from_config(config), None)
    windows = random_windows(40)
    for step in walk(bundle, windows, Stat.GRAM, tokens_at_once=2 * WINDOW):
        now = one_shot.inputs(bundle.model, step.stats, windows)
        for name, got in step.stats.items():
            x = flat(now[name])
            wanted = 2 / 40 * x.T @ x
            torch.testing.assert_close(got.gram.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
        for layer in step.layers:
            halve(layer)


# What is refused


def told(model: Toy, hidden: Tensor, ids: Tensor) -> Tensor:
    for block in model.blocks:
        block.size = ids.float().mean() / 32
    return straight(model, hidden, ids)


def noisy(model: Toy, hidden: Tensor, ids: Tensor) -> Tensor:
    for block in model.blocks:
        hidden = block(hidden + torch.rand_like(hidden))
    return hidden


def counting(block: Block, hidden: Tensor) -> Tensor:
    block.calls = getattr(block, "calls", 0) + 1
    return hidden + block.added(hidden) * block.calls


def residual_of_first(block: Block, hidden: Tensor) -> Tensor:
    """Value residuals: the first block leaves its values in a place that the last one reads."""
    own = block.added(hidden)
    if block.first:
        block.place["values"] = own
    return hidden + own + (block.place["values"] if block.last else 0)


def placed(model: Toy, hidden: Tensor, ids: Tensor) -> Tensor:
    for number, block in enumerate(model.blocks):
        block.first, block.last = number == 0, number == 2
        block.place = model.place = getattr(model, "place", {})
    return straight(model, hidden, ids)


def cast(model: Toy, hidden: Tensor, ids: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return straight(model, hidden, ids)


@pytest.mark.parametrize(
    ("form", "join", "what"),
    [
        (lambda b, h: h + b.size * b.added(h), told, r"block blocks\.0 of toy computes something else"),
        (plain, noisy, r"block blocks\.0 of toy is given something else"),
        (counting, straight, r"block blocks\.0 of toy computes something else"),
        (residual_of_first, placed, r"block blocks\.2 of toy computes something else"),
        (plain, cast, "toy switches autocast, gradients or inference mode"),
    ],
    ids=["state of modules", "noise", "calls are counted", "state that the last block reads", "autocast"],
)
def test_what_pausing_would_change_is_refused(form, join, what):
    """A model whose passes disturb each other, or differ when repeated, is refused before anything is pruned."""
    bundle = Bundle.of("toy", Toy(form, join), None)
    state = torch.get_rng_state()
    with pytest.raises(NMBenchError, match=f"{what}.*; it cannot be walked"):
        next(walk(bundle, random_windows(), Stat.GRAM))
    assert torch.equal(torch.get_rng_state(), state)


def early_exit(model: Toy, hidden: Tensor, ids: Tensor) -> Tensor:
    for block in model.blocks[: 2 if (ids == 63).any() else 3]:
        hidden = block(hidden)
    return hidden


def swapped(model: Toy, hidden: Tensor, ids: Tensor) -> Tensor:
    order = (0, 2, 1) if (ids == 63).any() else (0, 1, 2)
    for number in order:
        hidden = model.blocks[number](hidden)
    return hidden


@pytest.mark.parametrize(
    ("join", "what"), [(early_exit, "calls 2 of its 3 blocks"), (swapped, "does not call its blocks in order")]
)
def test_another_order_for_some_tokens_is_refused(join, what):
    """A batch whose tokens take another way through the blocks ends the walk, and nothing stays paused."""
    bundle, windows = Bundle.of("toy", Toy(plain, join), None), random_windows().clamp(max=62)
    windows[2, 3] = 63
    with pytest.raises(NMBenchError, match=f"toy {what}; it cannot be walked"):
        list(walk(bundle, windows, Stat.GRAM, tokens_at_once=WINDOW))
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in bundle.model.modules())


def test_writing_into_inputs_for_some_tokens_only_is_refused():
    """A block that writes into its inputs for some tokens only would spoil the inputs of the pruned block."""

    def at_times(block: Block, hidden: Tensor, ids: Tensor) -> Tensor:
        return within(block, hidden) if (ids == 63).any() else plain(block, hidden)

    bundle = Bundle.of("toy", Toy(at_times, each(lambda b, h, ids: b(h, ids))), None)
    windows = random_windows().clamp(max=62)
    windows[2, 3] = 63
    with pytest.raises(NMBenchError, match=r"block blocks\.0 of toy writes into its inputs for some tokens only"):
        list(walk(bundle, windows, Stat.GRAM, tokens_at_once=WINDOW))


class TwoStacks(Toy):
    """Attention and MLP in two stacks, as XLM has them; `between` is called between the blocks, or before them."""

    def __init__(self, between: bool) -> None:
        super().__init__(plain, straight)
        self.others = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.between = between

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        for number, block in enumerate(self.blocks):
            for other in self.others[number : number + 1] if self.between else () if number else self.others:
                hidden = hidden + other(hidden)
            hidden = block(hidden)
        return self.head(hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_compared_whatever_their_numbers(dtype):
    """Masks of the least number of their dtype, whose square is infinite in float32, differ where one entry does."""
    mask = torch.full((4, 4), torch.finfo(dtype).min, dtype=dtype).triu(1)
    other = mask.clone()
    other[2, 3] = 0
    assert alike(mask, mask.clone())
    assert not alike(mask, other)
    assert not alike(other, mask)


def test_a_second_stack_is_refused():
    """Layers of another stack that run between the blocks would stay dense unnoticed; layers before them may run."""
    with pytest.raises(NMBenchError, match=r"toy runs others\.1 between its decoder blocks"):
        list(walk(Bundle.of("toy", TwoStacks(True), None), random_windows(), Stat.GRAM))
    assert len(list(walk(Bundle.of("toy", TwoStacks(False), None), random_windows(), Stat.GRAM))) == 3


def test_a_cache_that_the_configuration_asks_for():
    """A configuration that asks for a cache does not while the model is walked, and does again afterwards."""

    def cached(model: Toy, hidden: Tensor, ids: Tensor) -> Tensor:
        assert not model.config.use_cache
        return straight(model, hidden, ids)

    bundle = Bundle.of("toy", Toy(plain, cached), None)
    bundle.model.config = type("Config", (), {"use_cache": True})()
    list(walk(bundle, random_windows(), Stat.GRAM))
    assert bundle.model.config.use_cache is True


# Where blocks come from the host


@pytest.mark.parametrize("form", ["plain", "residual pairs", "embeddings between", "masks from tokens"])
def test_streamed_models_are_walked_alike(form):
    """Where what waits is on the host, the statistics are, bit for bit, the same; tensors stay the objects they are."""
    found = []
    for streamed in (False, True):
        bundle, windows = toy(form), random_windows()
        if streamed:
            bundle.stream(torch.device("cpu"))
        stats = {}
        for step in walk(bundle, windows, ALL, sequential=True, tokens_at_once=2 * WINDOW):
            stats.update(step.stats)
            for layer in step.layers:
                halve(layer)
        found.append(stats)
    assert found[0].keys() == found[1].keys()
    for name, got in found[1].items():
        assert torch.equal(got.gram, found[0][name].gram)
        assert torch.equal(got.drift, found[0][name].drift)


@torch.no_grad()
def test_what_waits_is_found_and_brought_back():
    """Hidden states, embeddings and views wait in storages of their own, views of one storage in one; parameters and
    tokens stay where they are.
    """
    noted = {}

    def join(model: Toy, hidden: Tensor, ids: Tensor) -> Tensor:
        pair = [hidden[:1], hidden.expand(2, -1, -1, -1)]
        noted.update(hidden=hidden, pair=pair, ids=ids, weight=model.head.weight, before=hidden.clone())
        weight = model.head.weight
        out = straight(model, hidden, ids)
        return out + 0 * (len(pair) + weight[0, 0])

    bundle, windows = Bundle.of("toy", Toy(plain, join), None), random_windows()
    bundle.stream(torch.device("cpu"))

    def places() -> list[int]:
        values = (noted["hidden"], *noted["pair"], noted["ids"], noted["weight"])
        return [value.untyped_storage().data_ptr() for value in values]

    with paused_forwards(bundle, [windows]) as passes:
        waiting = places()
        assert waiting[0] == waiting[1] == waiting[2]
        assert noted["pair"][1].stride() == (0, *noted["hidden"].stride())
        assert torch.equal(noted["hidden"], noted["before"])
        assert waiting[3:] == [t.untyped_storage().data_ptr() for t in (windows, bundle.model.head.weight)]
        go_on(bundle, passes)
        assert torch.equal(noted["hidden"], noted["before"])
        assert places()[0] == waiting[0]  # was not copied to the host again
