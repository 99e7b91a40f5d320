"""Laws of Pareto fronts: nobody on a front is dominated, and everybody off it is dominated by somebody on it."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmbench.results.pareto import Point, cost_of, front, pareto

axis = st.integers(0, 6).map(float) | st.floats(0, allow_nan=False, allow_infinity=False)
clouds = st.lists(st.builds(Point, axis, axis), min_size=1, max_size=12).map(lambda found: dict(enumerate(found)))


@given(clouds)
def test_front_by_its_definition(points):
    """Off the front is what has a rival on the front that is nowhere worse and somewhere better; nobody else."""
    on = front(points)
    for key, (loss, cost) in points.items():
        rivals = [points[other] for other in on if points[other].loss <= loss and points[other].cost <= cost]
        assert any(rival != points[key] for rival in rivals) == (key not in on)


@given(clouds)
def test_front_is_a_falling_staircase(points):
    """Along a front from cheap to dear the loss falls; the best and the cheapest are on it."""
    on = sorted({points[key] for key in front(points)}, key=lambda point: point.cost)
    assert all(a.cost < b.cost and a.loss > b.loss for a, b in itertools.pairwise(on))
    assert on[-1].loss == min(point.loss for point in points.values())
    assert on[0].cost == min(point.cost for point in points.values())


def record(label, value, seed=0, prune=1.0, lower=True, device=None, backward=0):
    return {
        "label": label,
        "pattern": "2:4",
        "seed": seed,
        "status": "ok",
        "metrics": {
            "m:x@8": {"value": value, "lower_is_better": lower},
            "other": {"value": 0, "lower_is_better": True},
        },
        "seconds": {"prune": prune},
        "peak_bytes": {"host": 10, "device": device},
        "cost": {"forward_tokens": 100, "backward_tokens": backward},
    }


def test_costs():
    """A backward token counts twice; memory is the device's, and no cost without one."""
    assert cost_of(record("a", 1.0, prune=3.5, backward=7)) == {"seconds": 3.5, "tokens": 114}
    assert cost_of(record("a", 1.0, device=4))["bytes"] == 4


def test_unknown_costs_are_on_no_front():
    """Masks whose cost nobody knows are on no front, and keep nobody off one."""
    unknown = {**record("imported", 0.5), "cost": {"forward_tokens": None, "backward_tokens": None}}
    assert pareto([unknown, record("a", 1.0)]) == {
        (None, "imported", "2:4"): [],
        (None, "a", "2:4"): ["seconds", "tokens"],
    }


@pytest.mark.parametrize(("slower", "on"), [(1.02, ["seconds", "tokens"]), (1.2, ["tokens"])])
def test_noise_of_seconds_is_no_cost(slower, on):
    """Seconds that differ by a few per cent are equal; a row that is clearly slower is off the front of seconds."""
    found = pareto([record("a", 1.0, prune=100.0), record("b", 1.0, prune=100.0 * slower)])
    assert found[None, "b", "2:4"] == on


def test_seeds_are_averaged_first():
    """A lucky seed puts no row on a front on which its mean is not."""
    rows = [record("lucky", 1.0), record("lucky", 9.0, seed=1), record("steady", 4.0), record("steady", 4.0, seed=1)]
    assert pareto(rows) == {(None, "lucky", "2:4"): [], (None, "steady", "2:4"): ["seconds", "tokens"]}


@pytest.mark.parametrize(("lower", "winner"), [(True, "small"), (False, "large")])
def test_direction_of_the_metric(lower, winner):
    """Where larger is better, the larger value is on the front."""
    found = pareto([record("small", 0.1, lower=lower), record("large", 0.9, lower=lower)])
    assert [label for (_, label, _), kinds in found.items() if kinds] == [winner]
