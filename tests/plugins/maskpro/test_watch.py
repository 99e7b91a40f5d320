"""Laws of the watch: when it goes back, when it gives up, and what it confirms."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from nmbench_plugins.maskpro.masks import Packed
from nmbench_plugins.maskpro.tracker import Figures
from nmbench_plugins.maskpro.watch import AT_ONCE_NATS, FORGOTTEN_NATS, HALVINGS, PATIENCE, Watch
from reference.planted import cycles, equal, make

CLEAR, WITHIN = 0.1, 0.002  # nats above the best
START = -0.5  # mean log P of the initial mask


class Script:
    """An engine whose greedy masks have the losses of a list, the same on every window."""

    def __init__(self, levels: Sequence[float], log_probs: Sequence[float] = (), spread: float = 0.0) -> None:
        self.levels = iter(levels)
        self.log_probs = itertools.chain([START], log_probs, itertools.repeat(START))
        self.spread = spread
        self.generator = torch.Generator().manual_seed(0)
        self.restarts: list[float] = []
        self.learning_rate = 8.0

    def losses(self, windows: Tensor, masks: object = None) -> Tensor:
        level = next(self.levels)
        noise = torch.randn(len(windows), generator=self.generator)
        return level + self.spread * (noise - noise.mean())

    def log_prob(self, masks: object) -> float:
        return next(self.log_probs)

    def figures(self) -> Figures:
        return Figures(0, 0.0, 0.0, 0.0, self.learning_rate, None)

    def slow_down(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate

    def restart(self, masks: object, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.restarts.append(learning_rate)


def watched(script: Script, count: int, tolerance_nats: float = 0.005) -> Watch:
    """A watch after `count` measurements, one every 10 steps, of masks that differ each time."""
    task = make(selection=cycles(16))
    watch = Watch(task, script, Packed(task.initial, torch.device("cpu")), tolerance_nats)
    watch.start()
    for number in range(1, count + 1):
        moved = {name: mask.roll(4 * number, 1) for name, mask in task.initial.items()}
        watch.measure(10 * number, Packed(moved, torch.device("cpu")))
    return watch


def test_best_mask_is_kept():
    """The mask with the lowest loss is kept, bit by bit, whatever comes later."""
    watch = watched(Script([1.0, 0.8, 0.5, 0.501, 0.502]), 4)
    assert watch.best_step == 20
    assert equal(dict(watch.best), {name: mask.roll(8, 1) for name, mask in watch.task.initial.items()})
    assert watch.drifts == []


@pytest.mark.parametrize(("gained", "back"), [(0.9, False), (0.51, False), (0.49, True), (0.0, True)])
def test_drift(gained, back):
    """Clearly worse several times in a row: on with half the step size if little of the gain is lost, and if not
    back to the best mask; either is on record.
    """
    script = Script([0.5 + gained, 0.5, *[0.5 + CLEAR] * PATIENCE])
    watch = watched(script, 1 + PATIENCE)
    (drift,) = watch.drifts
    best = 10 if gained else 0
    assert drift["step"] == 10 + 10 * PATIENCE and drift["back_to"] == (best if back else None)
    assert "held-out loss 0.1000 nats above the best" in drift["why"]
    assert drift["learning_rate"] == script.learning_rate == 4.0
    assert script.restarts == ([4.0] if back else [])
    assert watch.best_step == best


def test_drift_that_goes_on_is_seen_again():
    """Measurements are counted anew after a drift; every one halves the step size."""
    script = Script([1.5, 0.5, *[0.5 + CLEAR] * 3 * PATIENCE])
    watch = watched(script, 1 + 3 * PATIENCE)
    assert [drift["learning_rate"] for drift in watch.drifts] == [4.0, 2.0, 1.0]
    assert script.restarts == [] and watch.best_step == 10


@pytest.mark.parametrize(
    "levels",
    [
        [*[0.5 + CLEAR] * (PATIENCE - 1), 0.5, *[0.5 + CLEAR] * (PATIENCE - 1)],  # it came back in between
        [0.5 + WITHIN] * 20,
        [0.5 - 0.01 * k for k in range(20)],
    ],
)
def test_no_drift(levels):
    """One bad measurement, a rise within the tolerance and a falling loss change nothing."""
    script = Script([1.0, 0.5, *levels])
    assert watched(script, 1 + len(levels)).drifts == []
    assert script.restarts == []


def test_rise_that_may_be_chance_is_no_drift():
    """A rise that is small against the spread between windows is not clear."""
    script = Script([1.0, *[0.5 + 0.01 * k for k in range(12)]], spread=1.0)
    assert watched(script, 12).drifts == []


@pytest.mark.parametrize("level", [1.0 + AT_ONCE_NATS + 0.1, torch.nan])
def test_collapse_is_seen_at_once(level):
    """A loss that explodes, or is not a number, needs no second measurement."""
    watch = watched(Script([1.0, level]), 1)
    assert [drift["back_to"] for drift in watch.drifts] == [0]


def test_forgotten_mask_is_drift():
    """A policy that hardly draws its best mask any more has drifted, even if the greedy mask is good."""
    watch = watched(Script([1.0, 0.5, 0.501], [START, START - FORGOTTEN_NATS - 0.1]), 2)
    assert "mean log P of the best mask fell from -0.500 to -1.600" in watch.drifts[0]["why"]


def test_step_size_is_not_halved_for_ever():
    """After a number of halvings learning ends."""
    script = Script([1.0, *[5.0] * (HALVINGS + 1)])
    assert not watched(Script([1.0, *[5.0] * HALVINGS]), HALVINGS).exhausted
    assert watched(script, HALVINGS + 1).exhausted
    assert script.restarts[-1] == 8.0 / 2 ** (HALVINGS + 1)


@pytest.mark.parametrize(("difference", "returned"), [(-0.1, "learnt"), (0.004, "learnt"), (0.006, "initial")])
def test_verdict(difference, returned):
    """A mask that is not worse than the initial one by more than the tolerance is returned, no other."""
    watch = watched(Script([1.0, 0.5, 2.0 + difference, 2.0]), 1)
    masks = watch.verdict()
    assert watch.notes["returned"] == returned
    assert equal(dict(masks), dict(watch.best) if returned == "learnt" else watch.task.initial)
    assert watch.notes["confirmation"]["nats"] == pytest.approx(difference, abs=1e-6)


def test_tolerance_is_an_option():
    """With another tolerance the same mask passes."""
    watch = watched(Script([1.0, 0.5, 2.2, 2.0]), 1, tolerance_nats=0.3)
    watch.verdict()
    assert watch.notes["returned"] == "learnt"
