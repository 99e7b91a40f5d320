"""Laws of the engines: both compute the published update, and work left for later is never seen from outside."""

import itertools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmbench.errors import NMBenchError
from nmbench.pattern import Pattern
from nmbench.pruning.learning import LearnTask
from nmbench.pruning.live_weights import LiveWeights
from nmbench_plugins.maskpro.engines import Engine, StreamedEngine, TorchEngine
from nmbench_plugins.maskpro.engines.logits import Logits
from nmbench_plugins.maskpro.tracker import Rule
from reference import maskpro as reference
from reference.plain_kernels import PlainKernels
from reference.planted import (
    FOUR_EIGHT,
    LENGTH,
    TWO_FOUR,
    cycles,
    equal,
    logits_of,
    loss_of,
    planted,
    record_draws,
    working,
)

ONE_FOUR = Pattern(1, 4)
RULE = Rule(learning_rate=3.0, prior=2.0, decay=0.99, normalise=False)
quick = settings(max_examples=9, deadline=None)
patterns = pytest.mark.parametrize(
    "pair",
    [(TWO_FOUR, TWO_FOUR), pytest.param((FOUR_EIGHT, FOUR_EIGHT), marks=pytest.mark.slow), (ONE_FOUR, FOUR_EIGHT)],
)


def opened(kind: str, rule: Rule = RULE, **task: object) -> AbstractContextManager[Engine]:
    """An engine on the planted model."""
    if kind == "torch":
        return working(lambda task, live: TorchEngine(task, live, rule), **task)
    return working(lambda task, live: StreamedEngine(task, live, rule, PlainKernels()), **task)


engines = pytest.mark.parametrize("kind", ["torch", "streamed"])


def minibatch(task: LearnTask, step: int) -> Tensor:
    return task.pool[torch.arange(3 * step, 3 * step + 3) % len(task.pool)]


def advance(engine: Engine, steps: int) -> None:
    """Take steps on minibatches in fixed order."""
    start = engine.figures().step
    for step in range(start, start + steps):
        windows = minibatch(engine.task, step)
        engine.advance(windows, loss_under(engine, engine.task.initial, windows))


def loss_under(engine: Engine, masks: Mapping[str, Tensor], windows: Tensor) -> Tensor:
    return torch.stack([torch.tensor(loss_of(engine.task, masks, window[None])) for window in windows]).float()


# The update


@pytest.fixture
def recorded(monkeypatch) -> list[dict[str, Tensor]]:
    """The masks that the torch engine draws, step by step, bool [out, in] by layer."""
    return record_draws(monkeypatch)


def drawn_by(engine: Engine, recorded: list[dict[str, Tensor]], steps: int) -> list[dict[str, Tensor]]:
    """The masks of all steps by layer, [groups, group]."""
    if engine.name == "torch":
        return [{n: m.reshape(-1, engine.task.pattern[n].group) for n, m in masks.items()} for masks in recorded]
    names = {first: name for name, first in engine.first_group.items()}
    found: list[dict[str, Tensor]] = [{} for _ in range(steps)]
    for step, first, mask in engine.kernels.drawn:
        found[step][names[first]] = mask
    return found


@engines
@patterns
def test_steps_are_the_papers(kind, pair, recorded):
    """25 steps follow the published formulas, computed from all orders of a draw with autograd in float64."""
    with opened(kind, patterns=pair, seed=4) as engine:
        task = engine.task
        advance(engine, 25)
        masks, figures, logits = drawn_by(engine, recorded, 25), engine.figures(), logits_of(engine)
    initial = {n: mask.reshape(-1, task.pattern[n].group) for n, mask in task.initial.items()}

    def loss(step: int, masks: Mapping[str, Tensor]) -> float:
        return loss_of(task, {n: mask.reshape(task.layers[n]) for n, mask in masks.items()}, minibatch(task, step))

    wanted, delta = reference.learn(initial, masks, loss, RULE.learning_rate, RULE.prior)
    for name in task.layers:
        got = logits[name].double().view(wanted[name].shape)
        torch.testing.assert_close(got, wanted[name], rtol=1e-3, atol=1e-3)
        assert (wanted[name] - wanted[name].round()).abs().max() > 0.01  # something was learnt
    assert figures.baseline == pytest.approx(delta, abs=1e-5)
    assert figures.step == 25


@quick
@given(st.lists(st.sampled_from(["greedy", "losses", "log_prob", "to_save", "references", "figures"]), max_size=6))
@pytest.mark.parametrize("kind", ["streamed", "torch"])
def test_reading_changes_nothing(kind, reads):
    """Whatever is asked of an engine between two steps, the logits afterwards are the same to the bit."""
    with opened(kind) as engine:
        advance(engine, 7)
        plain = logits_of(engine)
    with opened(kind) as engine:
        for read in [*reads, *["figures"] * (7 - len(reads))]:
            advance(engine, 1)
            {
                "greedy": engine.greedy,
                "losses": lambda: engine.losses(cycles(2), engine.task.initial),
                "log_prob": lambda: engine.log_prob(engine.task.initial),
                "to_save": engine.to_save,
                "references": lambda: engine.references(cycles(2)),
                "figures": engine.figures,
            }[read]()
        assert equal(logits_of(engine), plain)


@engines
def test_saved_engine_goes_on(kind):
    """An engine that takes over what another saved goes on like that one."""
    with opened(kind, seed=3) as engine:
        advance(engine, 4)
        saved = {n: v.clone() if isinstance(v, Tensor) else v for n, v in engine.to_save().items()}
        state = engine.task.generator.get_state()
        advance(engine, 3)
        wanted, figures = logits_of(engine), engine.figures()
    with opened(kind, seed=3) as engine:
        engine.load(saved)
        engine.task.generator.set_state(state)
        advance(engine, 3)
        assert equal(logits_of(engine), wanted)
        assert engine.figures() == figures


def test_checkpoint_of_another_engine_is_refused():
    """The engines draw other masks, so neither goes on from the other's checkpoint."""
    with opened("torch") as engine:
        saved = engine.to_save()
    with opened("streamed") as engine, pytest.raises(NMBenchError, match="acme has a checkpoint of engine torch"):
        engine.load(saved)


# What an engine shows


@engines
@patterns
def test_start(kind, pair):
    """At first the greedy mask is the initial one, its losses are the references, and it is as likely as C says."""
    with opened(kind, patterns=pair) as engine:
        task = engine.task
        windows = cycles(5)
        assert equal(dict(engine.greedy()), task.initial)
        torch.testing.assert_close(engine.references(windows), loss_under(engine, task.initial, windows))
        torch.testing.assert_close(engine.losses(windows), loss_under(engine, task.initial, windows))
        logits = {n: RULE.prior * mask.double() for n, mask in task.initial.items()}
        groups = {n: task.pattern[n].groups for n in task.layers}
        chances = [
            reference.log_prob(groups[n](logits[n]).flatten(0, 1), groups[n](mask).flatten(0, 1))
            for n, mask in task.initial.items()
        ]
        assert engine.log_prob(task.initial) == pytest.approx(float(torch.cat(chances).mean()), abs=1e-6)


@engines
def test_greedy_mask_is_the_largest_logits(kind):
    """After some steps the greedy mask keeps the largest logits, and the model's losses under it are shown."""
    with opened(kind, patterns=(TWO_FOUR, FOUR_EIGHT)) as engine:
        advance(engine, 30)
        masks, logits = dict(engine.greedy()), logits_of(engine)
        assert not equal(masks, engine.task.initial)
        assert equal(masks, {n: engine.task.pattern[n].top(logits[n]) for n in masks})
        torch.testing.assert_close(engine.losses(cycles(4)), loss_under(engine, masks, cycles(4)))
        torch.testing.assert_close(engine.losses(cycles(4), masks), loss_under(engine, masks, cycles(4)))


@engines
def test_restart(kind):
    """After a restart the logits are those of the given masks, no old update arrives, and the step size is new."""
    with opened(kind) as engine:
        advance(engine, 5)
        masks = {name: ~mask for name, mask in engine.task.initial.items()}
        engine.restart(masks, 0.25)
        assert equal(logits_of(engine), {n: RULE.prior * mask for n, mask in masks.items()})
        figures = engine.figures()
        assert (figures.step, figures.baseline, figures.spread, figures.learning_rate) == (5, 0, 0, 0.25)
        before = logits_of(engine)
        advance(engine, 1)
        moved = max((logits_of(engine)[n] - before[n]).abs().max() for n in before)
        assert 0 < moved <= 0.25 * 0.99 * abs(engine.figures().residual) * 2


@engines
def test_broken_loss_is_seen_and_moves_nothing(kind):
    """The first step with a loss that is not finite is named, and neither it nor later ones move a logit."""
    with opened(kind) as engine:
        advance(engine, 2)
        before = logits_of(engine)
        engine.advance(minibatch(engine.task, 2), torch.full((3,), torch.nan))
        assert engine.figures().broken == 3
        engine.advance(minibatch(engine.task, 3), torch.zeros(3))
        assert engine.figures().broken == 3
        assert equal(logits_of(engine), before)


def test_forward_tokens_are_counted():
    """The streamed engine counts what it sends through the model by itself, beside two windows of the host's proof."""
    with opened("streamed") as engine:
        engine.advance(cycles(3), torch.zeros(3))
        engine.references(cycles(5))
        engine.losses(cycles(2))
        assert engine.task.settle().forward_tokens == (10 + 2) * LENGTH


# What the streamed engine cannot do


def test_layer_computed_twice_is_refused(monkeypatch):
    """A layer that a forward pass computes twice would be updated twice, which is another algorithm."""
    model = planted()[0].model
    monkeypatch.setattr(model.head, "forward", lambda hidden: model.blocks[1](hidden))
    with opened("streamed") as engine, pytest.raises(NMBenchError, match=r"blocks\.1\.linear was computed 2 times"):
        engine.advance(cycles(3), torch.zeros(3))


def test_first_groups_never_meet():
    """Layers draw with different random numbers: no two groups of a step share a counter."""
    with opened("streamed", patterns=(TWO_FOUR, FOUR_EIGHT)) as engine:
        sizes = [w.numel() // engine.task.pattern[n].group for n, w in engine.weights.items()]
        assert list(engine.first_group.values()) == list(itertools.accumulate(sizes, initial=0))[:-1]


class Replay:
    """Stands for a CUDA graph: every replay calls the step on buffers of its own."""

    def __init__(self, call, tokens, references, state):
        self.call, self.tokens, self.references = call, tokens.clone(), references.clone()

    def replay(self, tokens, references):
        self.tokens.copy_(tokens)
        self.references.copy_(references)
        self.call(self.tokens, self.references)


def recording(task: LearnTask, live: LiveWeights) -> StreamedEngine:
    """A streamed engine that records its steps, as on CUDA."""
    return StreamedEngine(task, live, RULE, PlainKernels(), record=Replay)


def test_recorded_references_are_those_of_each_minibatch():
    """A recording serves minibatches of its shape, the last, smaller one is computed; it is gone when steps begin."""
    with opened("streamed") as engine:
        parts = [engine.task.pool[part] for part in (slice(3), slice(3, 6), slice(6, 7))]
        plain = [engine.references(part) for part in parts]
    with working(recording) as engine:
        found = [engine.references(part) for part in parts]
        assert engine._measuring is not None
        for one, other in zip(found, plain, strict=True):
            assert torch.equal(one, other)
        engine.advance(parts[0], found[0])
        assert engine._measuring is None


def test_recorded_steps_are_those_of_each_minibatch():
    """Replays of one recorded step end with the logits of steps that are called one by one."""
    with opened("streamed") as engine:
        advance(engine, 5)
        plain = logits_of(engine)
    with working(recording) as engine:
        advance(engine, 5)
        assert engine.note == "a step is one CUDA graph"
        assert equal(logits_of(engine), plain)


def test_units_have_one_logit():
    """At 2:4x2 the torch engine draws and learns as at 2:4 on half the inputs, and masks both weights of a pair."""
    pairs, half = Pattern.parse("2:4x2"), planted_masks()
    made = []
    for pattern, masks in ((TWO_FOUR, half), (pairs, {name: pairs.whole(mask) for name, mask in half.items()})):
        shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
        bundle = SimpleNamespace(device=torch.device("cpu"))
        task = SimpleNamespace(layers=shapes, pattern=dict.fromkeys(shapes, pattern), initial=masks, bundle=bundle)
        logits, generator = Logits.prior(task, 2.0), torch.Generator().manual_seed(5)
        for _ in range(3):
            drawn = logits.draw(generator)
            logits.step(drawn, 0.7)
        made.append((drawn.by_layer, logits.greedy(), logits.log_prob(masks)))
    (plain, greedy, chance), (of_pairs, greedy_of_pairs, chance_of_pairs) = made
    for name in half:
        assert torch.equal(of_pairs[name], pairs.whole(plain[name]))
        assert torch.equal(greedy_of_pairs[name], pairs.whole(greedy[name]))
    assert chance == chance_of_pairs


def planted_masks() -> dict[str, Tensor]:
    """Masks of two layers, of random groups of 2:4."""
    scores = torch.rand(2, 4, 16, generator=torch.Generator().manual_seed(1))
    return {f"layer {number}": TWO_FOUR.top(score) for number, score in enumerate(scores)}
