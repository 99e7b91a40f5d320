"""Laws of the method `import`: masks as they are, and zeros read as at most N."""

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nmbench
from nmbench.testing.strategies import patterns, tensors
from nmbench_plugins.importing import Import

quick = settings(max_examples=40, deadline=None)
LAYER = "model.layers.0.mlp.up_proj"
TWO_FOUR = nmbench.Pattern(2, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all examples of a law."""
    return tmp_path_factory.mktemp("importing")


def model_of(weight, pattern=TWO_FOUR, name=LAYER, skipped=()):
    return nmbench.DenseModel({name: weight}, {name: pattern}, dict.fromkeys(skipped, "a test"))


def sparse(folder, weight, name=LAYER):
    path = folder / "sparse.safetensors"
    safetensors.torch.save_file({f"{name}.weight": weight.contiguous()}, path)
    return Import(path=str(path))


@quick
@given(st.data())
def test_a_mask_on_the_dense_weights_is_found_again(folder, data):
    """From a checkpoint that is mask x dense weights, zeros and ties among them, a strict mask comes that makes it."""
    pattern = data.draw(patterns(max_group=8, units=(1, 2, 3)))
    dense = data.draw(tensors(pattern))
    mask = pattern.top(data.draw(st.sampled_from([dense.abs(), torch.rand(dense.shape), -dense.abs()])))
    checkpoint = dense.masked_fill(~mask, 0.0)
    brought = sparse(folder, checkpoint).bring(model_of(dense, pattern))
    found = brought.layers[LAYER].mask
    assert not pattern.broken(found).any()
    assert torch.equal(dense.masked_fill(~found, 0.0).abs(), checkpoint.abs())  # but for the sign of zeros
    notes = brought.notes["imported"]
    assert notes["groups_filled"] == int((pattern.kept(checkpoint != 0) < pattern.keep).sum())
    assert notes["filled_with_nonzero_dense_weights"] == 0
    assert notes["kept_weights_unlike_dense"] == 0
    assert brought.layers[LAYER].weight is None


def test_what_cannot_be_known_is_counted(folder):
    """A zero that is none in the dense model is filled with the smallest weight, and counted; so are other weights."""
    dense = torch.tensor([[4.0, 3.0, 2.0, 1.0, 5.0, 6.0, 7.0, 8.0]])
    checkpoint = torch.tensor([[4.0, 0.0, 0.0, 0.0, 5.0, 6.5, 0.0, 0.0]])
    brought = sparse(folder, checkpoint).bring(model_of(dense))
    assert brought.layers[LAYER].mask.int().tolist() == [[1, 0, 0, 1, 1, 1, 0, 0]]
    notes = dict(brought.notes["imported"])
    assert (notes["groups_filled"], notes["filled_with_nonzero_dense_weights"]) == (1, 1)
    assert notes["kept_weights_unlike_dense"] == 1
    assert len(notes["files_digest"]) == 16


def test_masks_of_non_zeros_are_filled_up(folder):
    """A mask file made of a checkpoint's non-zeros is read like the checkpoint; the record names its base model."""
    dense = torch.tensor([[4.0, 0.0, 2.0, 1.0, 5.0, 6.0, 7.0, 8.0]])
    entries = {f"{LAYER}.weight": np.packbits([1, 0, 0, 0, 1, 1, 0, 0]), f"{LAYER}.weight.__shape__": np.array([1, 8])}
    np.savez(folder / "p.npz", __meta__=np.array('{"base_model": "acme/base"}'), **entries)
    brought = Import(str(folder / "p.npz")).bring(model_of(dense))
    assert brought.layers[LAYER].mask.int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]
    notes = dict(brought.notes["imported"])
    assert (notes["groups_filled"], notes["filled_with_nonzero_dense_weights"]) == (1, 0)
    assert notes["base_model"] == "acme/base"
    with pytest.raises(nmbench.NotStrict, match=r"is not 1:4 in .*: 1 of 2 groups"):
        Import(str(folder / "p.npz")).bring(model_of(dense, nmbench.Pattern(1, 4)))


def test_weights_of_a_checkpoint_may_come_along(folder):
    """With `weights`, the row has the checkpoint's weights; masks have none to take."""
    dense, checkpoint = torch.ones(1, 4), torch.tensor([[2.0, 3.0, -0.0, 0.0]])
    method = sparse(folder, checkpoint)
    pruned = Import(method.path, weights=True).bring(model_of(dense)).layers[LAYER]
    assert torch.equal(pruned.weight, checkpoint)
    assert not pruned.weight[0, 2].signbit()
    np.savez(folder / "m.npz", **{f"{LAYER}.weight.mask": np.packbits([1, 1, 0, 0])})
    with pytest.raises(nmbench.NMBenchError, match="a checkpoint has weights to take"):
        Import(str(folder / "m.npz"), weights=True).bring(model_of(dense))


@quick
@given(st.data())
def test_a_group_with_too_many_is_refused(folder, data):
    """A checkpoint that is not at most N:M is refused with layer, row and columns."""
    pattern = data.draw(patterns(max_group=8))
    dense = torch.ones(3, 2 * pattern.group)
    mask = pattern.top(torch.rand(dense.shape))
    row, column = data.draw(st.sampled_from((~mask).nonzero().tolist()))
    mask[row, column] = True
    first = column - column % pattern.group
    expected = f"is not {pattern} in {LAYER}: 1 of 6 groups; first: row {row}, columns {first}.."
    with pytest.raises(nmbench.NotStrict, match=expected):
        sparse(folder, mask.float()).bring(model_of(dense, pattern))


def test_another_model_is_refused_by_name(folder):
    """A missing layer, another shape, and a layer that the model lacks are refused; what is left dense may be there."""
    checkpoint = TWO_FOUR.top(torch.rand(4, 8)).float()
    with pytest.raises(nmbench.NMBenchError, match=r"has shape \(8, 8\) in the model but \(4, 8\) in"):
        sparse(folder, checkpoint).bring(model_of(torch.ones(8, 8)))
    other = "model.layers.1.mlp.up_proj"
    with pytest.raises(nmbench.NMBenchError, match=f"masks for 1 layers that the model lacks; first: {LAYER}"):
        sparse(folder, checkpoint).bring(model_of(torch.ones(4, 8), name=other))
    with pytest.raises(nmbench.NMBenchError, match=f"no mask for layer {other}"):
        sparse(folder, checkpoint).bring(model_of(torch.ones(4, 8), name=other, skipped=(LAYER,)))
    names = (f"{LAYER}.weight", other)
    assert sparse(folder, checkpoint, other).bring(model_of(torch.ones(4, 8), name=other, skipped=names))


def test_the_content_of_the_file_is_part_of_the_job(folder):
    """Another file under the same name is another job; without a file there is none."""
    method = sparse(folder, torch.eye(4))
    before = method.content()
    assert method.content() == before
    assert sparse(folder, torch.eye(8)).content() != before
    with pytest.raises(nmbench.NMBenchError, match=r"give --set LABEL.path=PATH"):
        Import().content()
    with pytest.raises(nmbench.NMBenchError, match="does not exist"):
        Import("nothing").content()


def test_too_many_pairs_are_refused(folder):
    """A checkpoint with non-zeros in three of four pairs is not 2:4x2, though it has four non-zeros in eight."""
    weight = torch.tensor([[1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]])
    with pytest.raises(nmbench.NotStrict, match=r"columns 0..7 have non-zeros in 3 units of 2 instead of at most 2\."):
        sparse(folder, weight).bring(model_of(weight, nmbench.Pattern.parse("2:4x2")))
    assert sparse(folder, weight).bring(model_of(weight, nmbench.Pattern(4, 8))).layers
