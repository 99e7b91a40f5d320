"""Laws of the comparison of two masks."""

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.artifacts.artifact import Matrix
from nmbench.artifacts.difference import compare
from nmbench.artifacts.kept_masks import Kept, open_masks
from nmbench.artifacts.rendering import difference_json, difference_text
from nmbench.errors import NMBenchError
from nmbench.pattern import Pattern
from nmbench.testing.strategies import patterns, values

quick = settings(max_examples=50, deadline=None)


def kept(**layers):
    matrices = {n: Matrix(n, tuple(m.shape), True, lambda m=m: lambda a, b: m[a:b], 1) for n, m in layers.items()}
    return Kept("test", "test", matrices, {}, {})


@quick
@given(st.data())
def test_counts_are_those_of_the_definition(data):
    """Equal bits, equal groups and the Jaccard index equal those of a plain computation on whole masks."""
    pattern = data.draw(patterns(max_group=8))
    shape = (data.draw(st.integers(1, 5)), pattern.group * data.draw(st.integers(1, 5)))
    one, two = (values("normal", shape, data.draw(st.integers(0, 2**31))) > 0.5 for _ in range(2))
    (layer,) = compare(kept(a=one), kept(a=two), pattern).layers
    assert layer.shares["bits"] == pytest.approx((one == two).float().mean().item())
    equal = pattern.groups(one == two).all(dim=-1)
    assert (layer.equal_groups, layer.groups) == (int(equal.sum()), equal.numel())
    union = int((one | two).sum())
    assert layer.shares["jaccard"] == (int((one & two).sum()) / union if union else 1.0)
    assert compare(kept(a=two), kept(a=one), pattern).layers == [layer]
    same = compare(kept(a=one), kept(a=one), pattern).total
    assert set(same.shares.values()) == {1.0}


def test_layers_of_one_side_only_are_named():
    """Layers of one mask alone are listed; layers of both are compared, also if one name begins with `model.`."""
    mask = Pattern(2, 4).top(torch.rand(4, 8))
    found = compare(kept(**{"model.layers.0.a": mask, "model.layers.0.b": mask}), kept(**{"layers.0.a": mask}))
    assert [layer.name for layer in found.layers] == ["model.layers.0.a"]
    assert (found.only_first, found.only_second) == (["model.layers.0.b"], [])
    assert "first: model.layers.0.b" in difference_text(found)


def test_masks_of_different_models_are_refused():
    """Masks without a common layer, or with a layer of two shapes, raise an error that names the layers."""
    mask = Pattern(2, 4).top(torch.rand(4, 8))
    with pytest.raises(NMBenchError, match="no layer in common: 'a' in the first, 'b' in the second"):
        compare(kept(a=mask), kept(b=mask))
    with pytest.raises(NMBenchError, match=r"layer a has shape \(4, 8\) in test but \(2, 8\)"):
        compare(kept(a=mask), kept(a=mask[:2]))


def test_a_checkpoint_against_bits_without_shapes(tmp_path):
    """Packed bits take their shape from the weights they are compared with; the output notes the use of non-zeros."""
    mask = Pattern(2, 4).top(torch.rand(8, 16))
    safetensors.torch.save_file({"layers.0.a.weight": mask.float()}, tmp_path / "w.safetensors")
    np.savez_compressed(tmp_path / "m.npz", **{"layers.0.a.weight.mask": np.packbits(mask.numpy())})
    found = compare(open_masks(str(tmp_path / "m.npz")), open_masks(str(tmp_path / "w.safetensors")))
    content = difference_json(found)
    assert content["total"]["shares"] == {"bits": 1.0, "groups": 1.0, "jaccard": 1.0}
    assert content["layers"][0]["pattern"] == "2:4"
    assert "w.safetensors holds non-zeros, not masks: those are compared" in difference_text(found)
