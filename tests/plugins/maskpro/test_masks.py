"""Laws of masks that are stored as bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.results.files import pack, unpack
from nmbench_plugins.maskpro.masks import Packed
from reference.planted import equal


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 20), st.integers(0, 2**31))
def test_packed_masks_come_back(rows, inputs, seed):
    """A mask comes back from its bits, one a weight, in whatever memory it lay; and so it does from a checkpoint."""
    mask = torch.rand(inputs, rows, generator=torch.Generator().manual_seed(seed)).t() < 0.5
    bits = pack(mask)
    assert len(bits) == -(-mask.numel() // 8)
    assert torch.equal(unpack(bits, mask.shape), mask)
    packed = Packed({"a": mask, "b": ~mask}, mask.device)
    again = Packed({"a": mask, "b": mask}, mask.device).with_bits("best", packed.to_save("best"))
    assert equal(dict(again), {"a": mask, "b": ~mask})


def test_computed_masks_have_only_their_names():
    """A name that is no layer is missing, as in any mapping."""
    with pytest.raises(KeyError):
        Packed({"a": torch.ones(2, 4, dtype=torch.bool)}, torch.device("cpu"))["b"]
