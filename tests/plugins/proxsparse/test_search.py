"""Laws of the search for lam: its units, and the order of its trials."""

from __future__ import annotations

import pytest
import torch

from nmbench.pattern import Pattern
from nmbench_plugins.proxsparse.search import Trial, best_power, lams, next_power


def searched(losses: dict[int, float], most: int) -> list[int]:
    """The powers that a search tries where these are the losses."""
    trials: list[Trial] = []
    while (power := next_power(trials, most)) is not None:
        trials.append(Trial(power, losses[power]))
    return [trial.power for trial in trials]


@pytest.mark.parametrize("best", [-3, -1, 0, 1, 3])
def test_the_search_ends_beside_its_best(best):
    """The search walks to the lowest loss and tries both of its neighbours."""
    tried = searched({power: abs(power - best) for power in range(-9, 9)}, 9)
    assert {best - 1, best, best + 1} <= set(tried)
    assert len(tried) == len(set(tried)) <= abs(best) + 3


def test_the_search_stops_at_its_last_trial():
    """No more trials than allowed, and the best of them is taken."""
    losses = {power: float(-power) for power in range(9)} | {-1: 3.0}
    assert searched(losses, 4) == [0, 1, 2, 3]
    assert best_power([Trial(0, 2.0), Trial(1, 1.0), Trial(-1, 3.0)]) == 1


@pytest.mark.parametrize("pattern", [Pattern(1, 4), Pattern(2, 4), Pattern(4, 8)])
def test_lam_has_the_units_of_the_weights(pattern):
    """At equal strength, lam is inverse to the steps and to the weights' size to the power N - 1."""
    weight = {"layer": torch.randn(4, 16, generator=torch.Generator().manual_seed(0))}
    patterns = {"layer": pattern}
    lam = lams(1.0, 100, weight, patterns)[pattern]
    assert lams(4.0, 50, weight, patterns)[pattern] == pytest.approx(8 * lam)
    tenth = lams(1.0, 100, {"layer": weight["layer"] / 10}, patterns)[pattern]
    assert tenth == pytest.approx(lam * 10 ** (pattern.keep - 1), rel=1e-5)
