"""Laws of judged swaps: the proposals, their losses, and that only an improvement is taken."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from nmbench.comparison import Confirmation
from nmbench.errors import NMBenchError, NumericalFailure
from nmbench.evaluation.losses import window_losses
from nmbench.methods import LayerStats
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.pattern import Pattern
from nmbench.pruning import selection
from nmbench.pruning.learning import LearnTask
from nmbench.results.files import MemoryCheckpoints
from nmbench.verification.strict import check_masks
from nmbench_plugins.swaps import Swaps, SwapsJudged
from nmbench_plugins.swaps.aim import Aim
from nmbench_plugins.swaps.judge import Judge
from nmbench_plugins.swaps.judged_run import JudgedRun
from nmbench_plugins.tiny import FAMILIES, TinyModel
from reference.tiers import tiered

TWO_FOUR = Pattern(2, 4)
WINDOW, WINDOWS = 24, 12
EVERYTHING = {  # the whole pool, every time
    "statistics_tokens": WINDOW * WINDOWS,
    "judge_tokens": WINDOW * WINDOWS,
    "sweeps": 1,
}
FEW = {"statistics_tokens": 4 * WINDOW, "judge_tokens": 4 * WINDOW, "judge_window": 12, "margin": 0.0, "sweeps": 1}
FEW_AIMS = "0/0, 0.3/0.3"


def windows(count: int, seed: int) -> Tensor:
    return torch.randint(256, (count, WINDOW), generator=torch.Generator().manual_seed(seed))


def make(family="llama", pattern=TWO_FOUR, store=None, on_report=lambda *event: None, selection=None) -> LearnTask:
    """A task on a tiny model, from the masks that keep the smallest weights."""
    bundle = TinyModel().load(family)
    patterns = dict.fromkeys(bundle.layers, pattern)
    initial = {name: pattern.top(-layer.read().abs()) for name, layer in bundle.layers.items()}
    dense, store = DenseWeights(bundle), store or MemoryCheckpoints()
    selection = windows(8, 2) if selection is None else selection
    return LearnTask(bundle, dense, patterns, initial, windows(WINDOWS, 1), selection, 0, store, "acme", on_report)


@torch.no_grad()
def learnt(method: SwapsJudged, task: LearnTask, run: type[JudgedRun] = JudgedRun, **options: Any) -> dict[str, Tensor]:
    """Learn as the method does, with other options of the run."""
    with task.live_weights() as live:
        return run(task, method, live, **options).learnt()


def loss(task: LearnTask, masks: dict[str, Tensor], tokens: Tensor) -> float:
    """Mean loss of a model whose weights are written by hand."""
    bundle: Bundle = task.bundle
    before = {name: layer.read().clone() for name, layer in bundle.layers.items()}
    for name, layer in bundle.layers.items():
        layer.write(task.dense[name] * masks[name])
    with torch.no_grad():
        found = float(window_losses(bundle.model, tokens).double().mean())
    for name, layer in bundle.layers.items():
        layer.write(before[name])
    return found


@pytest.mark.parametrize(
    ("family", "pattern", "rounds"),
    [
        *((family, "2:4", 1 + (family == "gpt2")) for family in ("gemma3", "gpt2", "mixtral")),
        *(("llama", pattern, 2) for pattern in ("2:4", "1:4", "4:8")),
        *(
            pytest.param(family, "2:4", 1, marks=pytest.mark.slow)
            for family in sorted(set(FAMILIES) - {"gemma3", "gpt2", "llama", "mixtral"})
        ),
    ],
)
def test_the_gains_add_up_to_the_fall_of_the_loss(family, pattern, rounds):
    """Judged on the same windows every time, the loss falls by exactly what the taken proposals were said to gain."""
    selection = windows(WINDOWS, 1).repeat(2, 1)  # so that the best round is the last
    task = make(family, Pattern.parse(pattern), selection=selection)
    masks = SwapsJudged(rounds=rounds, aims=FEW_AIMS, margin=0.0, tolerance=9.0, **EVERYTHING).learn(task)
    check_masks(masks, task.pattern, task.layers, "acme")
    best = task.notes["best_round"]
    taken = [entry for record in task.notes["log"][1 : best + 1] for entry in record["taken"]]
    assert best > 0 and taken
    assert all(entry["nats"] <= 0 for entry in taken)
    fall = loss(task, masks, task.pool) - loss(task, task.initial, task.pool)
    assert fall == pytest.approx(sum(entry["nats"] for entry in taken), abs=1e-5 * (1 + len(taken)))
    assert fall < -1e-3


@pytest.mark.parametrize("aim", [Aim(0.0, 0.0), Aim(0.4, 0.1), Aim(1.0, 1.0)], ids=str)
@pytest.mark.parametrize("lagging", [True, False])
def test_proposals_are_those_of_swaps(aim, lagging):
    """What is proposed for an aim is what `swaps` with the same weights makes of the mask, next to other proposals."""
    task = make()
    name, (out, inputs) = next(iter(task.layers.items()))
    x, y, lag = (torch.randn(200, n, generator=torch.Generator().manual_seed(n)) for n in (inputs, inputs + 1, out))
    stats = LayerStats(1, 200, None, x.T @ x, (y[:, 1:] - x).T @ x, lag.T @ x if lagging else None)
    method = SwapsJudged(aims=f"0.2/0.9, {aim}, -1/0.5", sweeps=3)
    with task.live_weights() as live, torch.no_grad():
        proposed = JudgedRun(task, method, live).proposals(name, stats)
    swaps = Swaps(dense_weight=aim.dense, residual_weight=aim.residual, sweeps=3)
    wanted = swaps.refine(task.dense[name], stats, task.initial[name], task.pattern[name]).mask
    assert torch.equal(proposed[1], wanted)
    assert not torch.equal(proposed[1], task.initial[name])


@pytest.mark.parametrize(
    ("family", "minibatch"),
    tiered(sorted(FAMILIES), [2, 5], fast=lambda family, minibatch: minibatch == 2 or family == "llama"),
)
def test_a_judge_measures_the_whole_model(family, minibatch):
    """A judge that computes the blocks above once finds the losses of plain forward passes, for every block."""
    task = make(family)
    with task.live_weights() as live, torch.no_grad():
        live.apply(task.initial)
        for index, block in enumerate(task.bundle.blocks):
            judge = Judge(task, index, task.pool[:5], minibatch)
            for layer in task.bundle.block_layers(index):
                live[layer.name].copy_(task.dense[layer.name])
            plain = window_losses(task.model, task.pool[:5]).double()
            torch.testing.assert_close(judge.losses(), plain, rtol=1e-6, atol=1e-6)
            assert not torch.allclose(judge.present, plain, rtol=0, atol=1e-6), block
        assert not any("forward" in vars(block) for block in task.bundle.blocks.values())


def test_a_judge_counts_what_it_computes():
    """Blocks above are counted once, the block and those below every time, as shares of the model."""
    task = make()
    with torch.no_grad():
        judge = Judge(task, 1, task.pool, 4)
        judge.losses()
    assert task.cost.forward_tokens == 3 * task.pool.numel() // 2


@pytest.mark.parametrize("losses", [[1.0, 2.0, torch.nan], [1.0, 2.0, 3.0], [0.9, 2.2, 2.8]])
def test_what_is_not_clearly_better_is_not_preferred(losses):
    """Equal losses, differences within the margin and NaN are no reason to change."""
    task = make()
    with torch.no_grad():
        judge = Judge(task, 0, task.pool[:3], 3)
    judge.present = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert not judge.prefers(torch.tensor(losses, dtype=torch.float64), margin=1.0)
    assert judge.prefers(judge.present - 0.1, margin=1.0)


def test_nothing_is_taken_that_the_margin_forbids():
    """With a margin that nothing reaches, or without rounds, the initial mask comes back."""
    for method in (SwapsJudged(rounds=1, **{**FEW, "margin": 1e9}), SwapsJudged(rounds=0, **FEW)):
        task = make()
        masks = method.learn(task)
        assert all(torch.equal(masks[name], task.initial[name]) for name in masks)
        assert task.notes["returned"] == "initial"
        assert task.notes["groups_changed"] == 0


@pytest.mark.parametrize("holds", [True, False])
def test_the_unseen_half_has_the_last_word(monkeypatch, holds):
    """The mask found is returned only if the half of the selection windows not looked at confirms it."""
    asked = []

    def verdict(losses: Tensor, reference: Tensor, tolerance: float) -> Confirmation:
        asked.append((losses, reference))
        return Confirmation(0.0, 0.0 if holds else 1.0, tolerance, len(losses))

    monkeypatch.setattr(selection, "not_worse", verdict)
    task = make()
    masks = SwapsJudged(rounds=1, **EVERYTHING).learn(task)
    assert task.notes["returned"] == ("judged" if holds else "initial")
    assert (task.notes["groups_changed"] > 0) == holds
    unseen = task.selection[4:]
    assert float(asked[0][1].mean()) == pytest.approx(loss(task, task.initial, unseen), abs=1e-6)
    if holds:
        assert float(asked[0][0].mean()) == pytest.approx(loss(task, masks, unseen), abs=1e-6)


class Doubled(JudgedRun):
    """A run whose proposals are those of two aims and of the present mask, some of them repeated."""

    def proposals(self, name: str, stats: LayerStats) -> list[Tensor]:
        first, second = super().proposals(name, stats)[:2]
        return [self.masks[name], first, first.clone(), second, first.clone()]


def test_no_proposal_is_judged_twice():
    """A proposal equal to another aim's, or to the present mask, costs no tokens; the first of equals is taken."""
    found = {}
    for many in (False, True):
        task = make()
        aims = "0/0, 0.3/0.3, 1/1, -1/-1, 2/2" if many else "0/0, 0.3/0.3"
        method = SwapsJudged(rounds=1, aims=aims, tolerance=9.0, **FEW)
        found[many] = learnt(method, task, Doubled if many else JudgedRun), task.cost.forward_tokens
    assert all(torch.equal(mask, found[True][0][name]) for name, mask in found[False][0].items())
    assert found[True][1] == found[False][1]


class Stop(BaseException):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize(
    ("family", "stop_at"),
    [("llama", 1), pytest.param("llama", 2, marks=pytest.mark.slow), ("llama", 3), ("llama", 4), ("qwen3moe", 2)],
)
def test_killed_and_started_again(family, stop_at):
    """Killed after any block and started again, masks, costs and record are those of an uninterrupted run."""
    method, whole, wanted = uninterrupted(family)
    store, events = MemoryCheckpoints(), []

    def stop(stage: str, done: int, total: int | None, values: dict) -> None:
        events.append(stage)
        if stage.startswith("round") and len([e for e in events if e.startswith("round")]) == stop_at:
            raise Stop

    with pytest.raises(Stop):
        learnt(method, make(family, store=store, on_report=stop), checkpoint_seconds=-1.0)
    again = make(family, store=store)
    masks = learnt(method, again, checkpoint_seconds=-1.0)
    assert all(torch.equal(masks[name], wanted[name]) for name in wanted)
    assert (again.notes, again.experts) == (whole.notes, whole.experts)
    assert again.settle() == whole.settle()


@functools.cache
def uninterrupted(family: str) -> tuple[SwapsJudged, LearnTask, dict[str, Tensor]]:
    """A method, and a task with the masks that the method learns for it when nobody interrupts."""
    method, task = SwapsJudged(rounds=1 if family == "qwen3moe" else 2, aims=FEW_AIMS, **FEW), make(family)
    return method, task, learnt(method, task, checkpoint_seconds=-1.0)


def test_the_model_is_dense_again():
    """Whatever was tried, the weights are the dense ones afterwards."""
    task = make()
    digest = task.bundle.digest()
    SwapsJudged(rounds=1, **FEW).learn(task)
    assert task.bundle.digest() == digest


class Broken(Judge):
    """A judge for which every second proposal, the first or the second of a pair, has no finite loss."""

    first_of_pair: bool
    trials = 0  # of all judges

    def losses(self) -> Tensor:
        found = super().losses()
        if not hasattr(self, "present"):
            return found
        type(self).trials += 1
        return found * torch.nan if (self.trials % 2 == 1) == self.first_of_pair else found


@pytest.mark.parametrize("first_of_pair", [False, True])
def test_a_proposal_that_breaks_the_model_is_passed_over(first_of_pair):
    """A loss that is not a number loses against every other proposal, wherever it stands in the list."""
    judge = type("BrokenJudge", (Broken,), {"first_of_pair": first_of_pair})
    task = make()
    method = SwapsJudged(rounds=1, aims="0/0, 0.3/0.3", tolerance=9.0, **{**EVERYTHING, "margin": 0.0})
    learnt(method, task, judge=judge)
    assert task.notes["log"][1]["taken"]


def test_a_model_that_is_not_finite_is_refused():
    """A loss on calibration windows that is no number ends the run with a remedy."""
    task = make()
    task.bundle.model.get_output_embeddings().weight[0, 0] = torch.nan
    with pytest.raises(NumericalFailure, match="calibration window is NaN or infinite; another --dtype"):
        Judge(task, 0, task.pool, 4)


def test_one_window_cannot_judge():
    """A single window has no standard error: it is refused with the sizes that will do."""
    task = make()
    with pytest.raises(NMBenchError, match=r"acme.judge_tokens to 48 or more, and --pool-tokens"):
        SwapsJudged(rounds=1, judge_tokens=WINDOW, statistics_tokens=WINDOW).learn(task)


def test_experts_without_tokens_are_noted():
    """Experts that too few tokens reach are recorded once each, as those of one-shot methods are."""
    task = make("qwen3moe")
    SwapsJudged(rounds=2, aims=FEW_AIMS, **FEW).learn(task)
    unreached = task.experts.get("never_reached", [])
    noted = {*unreached, *task.experts.get("under_calibrated", {})}
    assert noted
    assert all("experts" in name for name in noted)
    assert len(unreached) == len(set(unreached))


def test_blocks_left_dense_are_not_judged():
    """Where a block has nothing to prune, no window is spent on it."""
    made = []
    task = make()
    for name in [layer.name for layer in task.bundle.block_layers(0)]:
        del task.bundle.layers[name], task.layers[name], task.initial[name], task.pattern[name]

    def judge(task: LearnTask, index: int, *rest: Any) -> Judge:
        made.append(index)
        return Judge(task, index, *rest)

    learnt(SwapsJudged(rounds=1, **FEW), task, judge=judge)
    assert made == [1]


def test_nan_on_the_selection_windows_is_an_error():
    """A model whose held-out loss is not finite is refused with a remedy."""
    task = make()
    task.bundle.model.get_output_embeddings().weight[0, 0] = torch.nan
    with pytest.raises(NumericalFailure, match="selection windows is NaN or infinite; another --dtype"):
        SwapsJudged(rounds=1, **FEW).learn(task)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"aims": "0/0, 0/0"}, "swaps-judged.aims must be like"),
        ({"aims": "0.1"}, "swaps-judged.aims must be like"),
        ({"aims": "nan/0"}, "swaps-judged.aims must be like"),
        ({"aims": "3/0"}, "numbers from -2 to 2"),
        ({"rounds": -1}, "swaps-judged.rounds must be at least 0, not -1"),
        ({"margin": float("nan")}, "swaps-judged.margin must be at least 0"),
        ({"judge_window": 1}, "swaps-judged.judge_window must be at least 2"),
    ],
)
def test_impossible_options(options, words):
    """An option that makes no sense is refused by name before any model is loaded."""
    with pytest.raises(NMBenchError, match=words):
        SwapsJudged(**options)


def test_too_few_selection_windows():
    """Two halves of at least two windows are needed."""
    task = make()
    task._selection = task._selection[:3]
    with pytest.raises(NMBenchError, match="at least 4 selection windows; raise --selection-tokens"):
        SwapsJudged().learn(task)


def test_through_the_command_line(nmbench, small, records, tmp_path):
    """A run has a row for the start and one for the learner, whose tokens are counted and whose choices are told."""
    tokens = ["--set", "swaps-judged.statistics_tokens=256", "--set", "swaps-judged.judge_tokens=256"]
    result = nmbench("run", *small, "--method", "swaps-judged", *tokens)
    assert result.exit_code == 0, result.output
    rows = {row["label"]: row for row in records(tmp_path / "out")}
    assert rows["swaps-judged@init"]["options"]["dense_weight"] == 0.15
    learnt = rows["swaps-judged"]
    assert learnt["cost"]["forward_tokens"] > 1000
    assert learnt["cost"]["backward_tokens"] == 0
    assert [entry["round"] for entry in learnt["notes"]["log"]] == [0, 1, 2]
