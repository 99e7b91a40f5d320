"""Laws of isolation: random states are what they were, and GPUs that a process does not use stay untouched."""

import contextlib
import random

import numpy as np
import pytest
import torch

from nmbench.runtime.isolation import keeping_random_states


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_the_random_states_are_what_they_were():
    """Whatever is drawn or seeded inside, the numbers after it are those that would have come."""
    with keeping_random_states():
        expected = drawn()
    with keeping_random_states():
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        drawn()
    assert drawn() == expected


@pytest.mark.parametrize(("used", "asked"), [(False, []), (True, [1])])
def test_gpus_of_others_are_left_alone(used, asked, monkeypatch):
    """Of several GPUs, the state of the present one is kept, and of none before CUDA is used: each would be started."""
    found = []

    @contextlib.contextmanager
    def noted(devices=None):
        found.append(devices)
        yield

    monkeypatch.setattr(torch.random, "fork_rng", noted)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with keeping_random_states():
        pass
    assert found == [asked]
