"""Laws of flips: sequences with flips of their own, the evidence for flips, and that only confirmed flips stay."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmbench.calibration import resumed
from nmbench.errors import NMBenchError
from nmbench.evaluation import all_logits
from nmbench.models.dense_weights import DenseWeights
from nmbench.pattern import Pattern
from nmbench.pruning.learning import LearnTask
from nmbench.results.files import MemoryCheckpoints
from nmbench.testing import LearnCase
from nmbench.testing.planted import cycles
from nmbench.verification.strict import check_masks
from nmbench_plugins.swaps import Flips, flips_run
from nmbench_plugins.swaps.evidence import gathered, output_error, seen, writers
from nmbench_plugins.swaps.flips_run import FlipsRun
from nmbench_plugins.swaps.mixtures import effects, flipped, of_rows
from nmbench_plugins.swaps.rewards import Draw, Rewards, with_draws
from nmbench_plugins.tiny import TinyModel
from reference.live import Live

WINDOW = 24
FEW = {"evidence_tokens": 96, "screen_tokens": 96, "confirm_tokens": 96, "window_tokens": 12}


def windows(count: int, seed: int) -> Tensor:
    return torch.randint(256, (count, WINDOW), generator=torch.Generator().manual_seed(seed))


def tiny_task(family="llama") -> LearnTask:
    """A task on a tiny model, from the masks that keep the smallest weights."""
    bundle = TinyModel().load(family)
    patterns = dict.fromkeys(bundle.layers, Pattern(2, 4))
    initial = {name: Pattern(2, 4).top(-layer.read().abs()) for name, layer in bundle.layers.items()}
    given = (bundle, DenseWeights(bundle), patterns, initial, windows(12, 1), windows(8, 2), 0)
    return LearnTask(*given, MemoryCheckpoints(), "acme")


@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_every_sequence_has_its_own_weights(seed, units, count):
    """x W + x dW_s in one pass of a minibatch is the product with W + dW_s of each sequence by itself."""
    task = LearnCase().task()
    generator = torch.Generator().manual_seed(seed)
    changes = {name: torch.randn(shape, generator=generator) for name, shape in task.layers.items()}
    chosen = torch.rand(count, len(changes), units, generator=generator) < 0.5
    tokens = cycles(count)
    with torch.no_grad():
        with flipped(task, changes, chosen):
            together = all_logits(task.model, tokens)
        for own, window, logits in zip(chosen, tokens, together, strict=True):
            with task.live_weights() as live:
                for (name, change), of_layer in zip(changes.items(), own, strict=True):
                    live[name].add_(change * of_rows(of_layer, len(change))[:, None])
                alone = all_logits(task.model, window[None])[0]
            torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)


@given(st.integers(0, 2**31), st.floats(0.01, 1.0), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_every_sequence_has_its_own_flips(seed, flips, count):
    """x W + x dW_s by gather and scatter is the product with strictly N:M weights of each sequence by itself."""
    task = LearnCase(seed=seed).task()
    method, tokens = Flips(evidence="rewards", flips=flips, cheap=1.0), cycles(count)
    with task.masked_weights() as live:
        rewards = Rewards(task, method, live, task.pool)
        rewards.start(task.pool)
        pools = {name: rewards.cheap(name, mask) for name, mask in task.initial.items()}
        draws = {name: rewards.draw(name, count, *pool) for name, pool in pools.items()}
        with with_draws(task, draws):
            together = all_logits(task.model, tokens)
        for s in range(count):
            masks = {name: with_flips_of(draw, s, task.initial[name]) for name, draw in draws.items()}
            check_masks(masks, task.pattern, task.layers, "acme")
            live.apply(masks)
            torch.testing.assert_close(together[s], all_logits(task.model, tokens[s : s + 1])[0], rtol=1e-4, atol=1e-4)


def with_flips_of(draw: Draw, sequence: int, mask: Tensor) -> Tensor:
    """The mask of one sequence, flip by flip."""
    new = mask.clone()
    for row, dropped, kept in zip(draw.row[sequence], draw.dropped[sequence], draw.kept[sequence], strict=True):
        new[row, dropped], new[row, kept] = True, False
    return new


@given(st.integers(1, 40), st.integers(1, 9))
def test_units_are_blocks_of_rows(rows, units):
    """Rows of a unit are neighbours, and the numbers of rows in units differ by one at most."""
    numbers = of_rows(torch.arange(units), rows)
    assert torch.equal(numbers, numbers.sort().values) and len(numbers) == rows
    counts = torch.bincount(numbers, minlength=units)
    assert int(counts.max() - counts.min()) <= 1


@torch.no_grad()
def test_local_evidence_is_errors_times_inputs():
    """H and E are means over the tokens of both passes, and the weights are the masked ones afterwards."""
    task = LearnCase().task()
    first, second = task.layers
    dense = {name: task.dense[name] for name in task.layers}
    masked = {name: weight * task.initial[name] for name, weight in dense.items()}
    x = F.one_hot(task.pool[:4], 16).float()[:, 1:].flatten(0, 1)
    with task.masked_weights() as live:
        found = gathered(task, live, task.initial, task.pool[:4], [], list(task.layers), 3, 1)
        assert all(torch.equal(live[name], masked[name]) for name in task.layers)
    hidden, wanted = x @ masked[first].T, x @ dense[first].T
    torch.testing.assert_close(found.gram[first], x.T @ x / len(x))
    torch.testing.assert_close(found.error[first], (hidden - wanted).T @ x / len(x))
    error = hidden @ masked[second].T - wanted @ dense[second].T
    torch.testing.assert_close(found.error[second], error.T @ hidden / len(x))


def test_layers_with_the_same_inputs_share_a_gram_matrix():
    """Query, key and value have one H, and the layers that write into the residual stream are found."""
    task = tiny_task()
    writing = writers(task)
    assert {name.split(".")[-1 - name.endswith("weight")] for name in writing} == {"o_proj", "down_proj"}
    local = [name for name in task.layers if name not in writing]
    with torch.no_grad(), task.masked_weights() as live:
        found = gathered(task, live, task.initial, task.pool[:4], sorted(writing), local, 4, 0)
    assert set(found.error) == set(task.layers)
    shared = {id(found.gram[name]) for name in local}
    assert len(shared) == 2 * len(task.bundle.blocks)


@torch.no_grad()
def test_layers_that_are_swept_together_get_their_own_masks():
    """Proposals of layers with the same inputs are those of each by itself, up to the rounding of near ties."""
    task = tiny_task()
    with task.live_weights() as live:
        run = FlipsRun(task, Flips(**FEW), live)
        run.start()
        names, evidence = list(task.layers)[:3], run.evidence()  # query, key, value
        together = run.proposed(names, evidence)
        alone = {name: run.proposed([name], evidence)[name] for name in names}
        assert list(run.by_errors()) == list(task.layers)  # whose order decides which draws of the screening are whose
    assert any(not torch.equal(alone[name], task.initial[name]) for name in names)
    same = [float((together[name] == alone[name]).float().mean()) for name in names]
    assert min(same) > 0.99


@torch.no_grad()
def test_large_layers_are_swept_one_by_one(monkeypatch):
    """Layers with the same inputs are swept together as long as they have few weights; each is swept once."""
    task = tiny_task()
    with task.live_weights() as live:
        run = FlipsRun(task, Flips(**FEW), live)
        run.start()
        evidence = run.evidence()
        together = run.alike(evidence)
        largest = max(error.numel() for error in evidence.error.values())
        for most in (1, largest, 2 * largest):
            monkeypatch.setattr(flips_run, "AT_ONCE", most)
            found = run.alike(evidence)
            assert sorted(itertools.chain(*found)) == sorted(itertools.chain(*together)) == sorted(evidence.error)
            assert all(len(names) == 1 or sum(evidence.error[n].numel() for n in names) <= most for names in found)
            assert (len(found) == len(task.layers)) == (most == 1)


@torch.no_grad()
def test_evidence_holds_outputs_or_inputs_of_a_layer():
    """While evidence is gathered, a token has the dense outputs of local layers and the inputs of writers, no more."""
    task = tiny_task()
    writing = sorted(writers(task))
    local = [name for name in task.layers if name not in writing]
    shapes = task.bundle.shapes
    numbers = sum(shapes[name][0] for name in local) + sum(shapes[name][1] for name in writing)
    peaks = []
    for count in (4, 8):
        with task.masked_weights() as live, Live([task.pool, *task.bundle.tensors().values()]) as alive:
            gathered(task, live, task.initial, task.pool[:count], writing, local, count, 0)
        peaks.append(alive.peak)
    assert 0 < peaks[1] - peaks[0] < 4 * numbers * 4 * WINDOW


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_output_error_is_the_derivative_of_the_divergence(family):
    """Steps of the last hidden state change KL(dense || pruned) in proportion to their product with the error."""
    task = tiny_task(family)
    part, last = task.pool[:2], len(task.bundle.blocks) - 1
    with torch.no_grad():
        with task.live_weights():
            dense = seen(task, part, [], lambda *_: None)
            wanted = all_logits(task.model, part).log_softmax(-1)
        with task.masked_weights():
            pruned = seen(task, part, [], lambda *_: None)
            error = output_error(task, part, dense, pruned, 0)

        def slope(along: Tensor) -> float:
            return (divergence(1e-2 * along) - divergence(-1e-2 * along)) / 2e-2

        def divergence(step: Tensor) -> float:
            with resumed(task.bundle, last, pruned.end + step):
                own = all_logits(task.model, part).log_softmax(-1)
            return float(F.kl_div(own.double(), wanted.double(), reduction="sum", log_target=True))

        half = error * (torch.arange(error.shape[-1]) % 2)  # a step with another direction
        assert slope(error) > 0
        assert slope(half) / slope(error) == pytest.approx(float((half * error).sum() / error.square().sum()), rel=0.02)


@torch.no_grad()
def test_effects_tell_help_from_harm():
    """Tried at once, larger weights of one layer help, and smaller weights of the other do harm."""
    task = LearnCase().task()
    first, second = task.layers
    with task.live_weights():
        found = effects(task, {first: 0.5 * task.dense[first], second: -0.5 * task.dense[second]}, 1, cycles(32), 8)
    assert float(found.ratio[0]) < -3 and float(found.ratio[1]) > 3


def test_only_confirmed_flips_stay():
    """Every step whose flips stay has lowered the loss of its fresh windows; notes and curve agree."""
    task = LearnCase().task()
    Flips(steps=5, local_step=1.0, check_every=5, **FEW).learn(task)
    flipped_at = [entry for entry in task.curve if entry.get("flipped")]
    assert flipped_at and all(entry["gain"] > 0 for entry in flipped_at)
    assert len(flipped_at) == task.notes["steps_taken"]


@pytest.mark.parametrize("family", ["gemma3", "mixtral"])
def test_other_architectures_can_be_flipped(family):
    """Norms behind layers and fused experts are no obstacle: what can be flipped is, and masks stay strict."""
    task = tiny_task(family)
    masks = Flips(steps=1, margin=0.0, tolerance=9.0, units=3, **FEW).learn(task)
    check_masks(masks, task.pattern, task.layers, "acme")
    assert task.curve[0]["step"] == 1


@pytest.mark.parametrize("count", [1, 3])
def test_few_windows_are_all_that_is_read(count):
    """A learner of few windows reads no other token of the pool; one window alone confirms no step."""
    task = tiny_task()
    Flips(steps=2, local_step=1.0, pool_windows=count, **FEW).learn(task)
    assert task.settle().unique_tokens == count * FEW["window_tokens"]
    assert count > 1 or task.notes["steps_taken"] == 0


def test_more_windows_than_the_pool_has_are_refused():
    """More windows than there are is an error that says how many tokens are needed."""
    with pytest.raises(NMBenchError, match="raise --pool-tokens to 300"):
        Flips(pool_windows=25, **FEW).learn(tiny_task())


@pytest.mark.parametrize("options", [{"steps": -1}, {"output_step": 0.0}, {"local_step": 3.0}, {"decay": 1.0}])
def test_impossible_options_are_refused(options):
    """An impossible option is refused with its name."""
    with pytest.raises(NMBenchError, match=f"flips.{next(iter(options))}"):
        Flips(**options)
