"""Checkpoints hold states of any depth: an optimiser's, with numbers as keys and tensors in lists."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.results.files import FileCheckpoints
from nmbench.results.nested_state import flattened, nested

leaves = st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3) | st.floats(allow_nan=False, width=32)
tensors = st.integers(0, 9).map(lambda n: torch.full((2,), float(n)))
keys = st.text("abc/@", min_size=1, max_size=3) | st.integers(0, 5)
states = st.recursive(
    leaves | tensors,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text("xyz", min_size=1, max_size=2), states, max_size=4))
def test_any_state_comes_back(state):
    """What was stored comes back, types, order and keys included, through JSON."""
    found, plain = flattened(state)
    assert same(nested(json.loads(json.dumps(plain)), found), state)


@pytest.mark.filterwarnings("ignore")
def test_an_optimiser_goes_on(tmp_path):
    """Adam's state survives a checkpoint file: the next step is the same."""
    store = FileCheckpoints(tmp_path / "state.safetensors", "job")

    def step(optimiser, parameter):
        optimiser.zero_grad()
        (parameter.square().sum() + parameter[0]).backward()
        optimiser.step()

    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimiser = torch.optim.Adam([parameter], lr=0.1)
    step(optimiser, parameter)
    store.save({"optimiser": optimiser.state_dict(), "parameter": parameter.detach()})
    step(optimiser, parameter)
    saved = store.load()
    again = torch.nn.Parameter(saved["parameter"])
    resumed = torch.optim.Adam([again], lr=0.1)
    resumed.load_state_dict(saved["optimiser"])
    step(resumed, again)
    assert torch.equal(again, parameter)
