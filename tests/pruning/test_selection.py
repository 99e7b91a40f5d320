"""Laws of the choice by held-out windows: the best mask is kept, the unread half confirms the choice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.errors import NMBenchError
from nmbench.pruning.selection import Selection
from reference.planted import cycles, make

MASKS = [{"a": torch.full((1, 1), index)} for index in range(9)]  # told apart by their only entry


def chosen(task, levels, unseen, tolerance=0.01):
    """A selection that was shown masks of these mean losses, the first of them initial, and its verdict."""
    selection = Selection(task, MASKS[0], tolerance)
    noise = torch.linspace(-1, 1, len(selection.looked_at))
    selection.start(levels[0] + noise)
    for at, level in enumerate(levels[1:], start=1):
        selection.look(at, MASKS[at], level + noise)
    asked = []

    def measure(windows, masks):
        asked.append(masks)
        assert torch.equal(windows, selection.unseen)
        return unseen[int(masks["a"])] + noise.double()

    return selection, selection.verdict(measure), asked


levels_of_looks = st.lists(st.one_of(st.integers(0, 5).map(float), st.just(float("nan"))), min_size=0, max_size=8)


@settings(max_examples=36, deadline=None)
@given(levels_of_looks, st.sampled_from([-0.5, 0.005, 0.5]))
def test_the_best_is_kept_and_returned_if_confirmed(looks, rise):
    """The first of the lowest losses is kept, NaN never; it is returned if the unseen half says it is not worse."""
    levels = [3.0, *looks]
    selection, masks, asked = chosen(make(selection=cycles(16)), levels, [2.0] + [2.0 + rise] * 8)
    finite = [level for level in levels if level == level]
    assert selection.best_at == levels.index(min(finite))
    assert selection.best is MASKS[selection.best_at]
    assert selection.confirmed == (selection.best_at > 0 and rise < 0.01)
    assert masks is (selection.best if selection.confirmed else MASKS[0])
    assert (selection.confirmation is None) == (asked == []) == (selection.best_at == 0)
    if asked:
        assert selection.confirmation.nats == pytest.approx(rise)


@pytest.mark.parametrize("looks", [[], [2.5], [2.5, 4.0], [4.0, 2.0, 5.0]])
def test_a_stored_selection_goes_on(looks):
    """A selection restored from its state has the same best masks, step and losses, also if later looks were worse."""
    task, initial = make(selection=cycles(16)), {"a": torch.tensor([[True, False]])}
    first = Selection(task, initial, 0.01)
    first.start(torch.full((8,), 3.0))
    for at, level in enumerate(looks, start=1):
        first.look(at, {"a": torch.tensor([[at % 2 == 0, at % 2 == 1]])}, torch.full((8,), level))
    again = Selection(task, initial, 0.01)
    again.restore(first.state())
    assert again.best_at == first.best_at and torch.equal(again.best_losses, first.best_losses)
    assert torch.equal(again.best["a"], first.best["a"])


def test_no_look_before_the_start():
    """Masks have nothing to be compared with before the losses of the initial masks are known."""
    selection = Selection(make(selection=cycles(16)), MASKS[0], 0.01)
    with pytest.raises(NMBenchError, match=r"acme calls Selection\.look before Selection\.start; measure the start"):
        selection.look(1, MASKS[1], torch.zeros(8))


@pytest.mark.parametrize("count", [4, 5, 16])
def test_the_halves_have_no_window_in_common(count):
    """Every selection window is in one half, each of which has two or more."""
    windows = torch.arange(count)[:, None].expand(-1, 8)
    selection = Selection(make(selection=windows), MASKS[0], 0.0)
    assert torch.equal(torch.cat([selection.looked_at, selection.unseen]), windows)
    assert min(len(selection.looked_at), len(selection.unseen)) >= 2


def test_nan_does_not_confirm():
    """A loss on the unseen half that is no number confirms nothing."""
    selection, masks, _ = chosen(make(selection=cycles(16)), [3.0, 1.0], [2.0, float("nan")])
    assert not selection.confirmed
    assert masks is MASKS[0]


def test_too_few_windows():
    """Halves of less than two windows are refused with the remedy."""
    with pytest.raises(NMBenchError, match="acme needs at least 4 selection windows; raise --selection-tokens"):
        Selection(make(selection=cycles(3)), MASKS[0], 0.0)
