"""Laws of the strict N:M check: accepted and refused masks, and the messages."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.errors import NMBenchError, NotStrict
from nmbench.pattern import Pattern
from nmbench.testing.strategies import masks, patterns, tensors
from nmbench.verification.strict import check_divides, check_masks, check_strict, masks_digest

quick = settings(max_examples=50, deadline=None)
LAYER = "model.layers.3.mlp.up_proj"
TWO_FOUR = Pattern(2, 4)


@st.composite
def pruned(draw):
    """A pattern, a strict mask, and a weight that is zero off the mask."""
    pattern = draw(patterns(max_group=16, units=(1, 2, 3)))
    weight = draw(tensors(pattern))
    mask = pattern.top(weight.abs())
    return pattern, mask, weight.masked_fill(~mask, 0.0)


def check(weight, mask, pattern, who="acme"):
    return check_strict({LAYER: weight}, {LAYER: mask}, {LAYER: pattern}, who)


def refusal(weight, mask, pattern):
    """The text of the refusal: one line that names the method and the layer."""
    with pytest.raises(NotStrict) as caught:
        check(weight, mask, pattern)
    text = str(caught.value)
    assert "acme" in text
    assert LAYER in text
    assert "\n" not in text
    return text


def draw_place(data, mask):
    """Any row and column of `mask` where it is True (or where it is not, for `~mask`)."""
    row, column = data.draw(st.sampled_from(mask.nonzero().tolist()))
    return row, column


@quick
@given(pruned())
def test_every_top_mask_is_accepted(case):
    """Best-of-group masks with zeros off the mask pass, and the proof counts groups, weights and zeros."""
    pattern, mask, weight = case
    proof = check(weight, mask, pattern)
    assert proof["layers"] == 1
    assert proof["groups"] * pattern.group == proof["weights"] == mask.numel()
    assert proof["zeros"] == proof["groups"] * (pattern.group - pattern.keep)


@quick
@given(pruned(), st.data())
def test_any_flipped_bit_is_rejected(case, data):
    """A mask with one bit flipped is refused, and layer, row, columns and count of that group are named."""
    pattern, mask, weight = case
    row, column = draw_place(data, torch.ones_like(mask))
    mask[row, column] = ~mask[row, column]
    first = column - column % pattern.group
    kept = int(mask[row, first : first + pattern.group].sum())
    text = refusal(weight, mask, pattern)
    assert f"broke {pattern} in {LAYER}: 1 of {mask.numel() // pattern.group} groups" in text
    assert f"row {row}, columns {first}..{first + pattern.group - 1} keep {kept} instead of {pattern.keep}." in text


@quick
@given(pruned(), st.data())
def test_first_of_many_broken_groups_is_named(case, data):
    """Of several broken groups the first in reading order is named, and all are counted."""
    pattern, mask, weight = case
    groups = mask.numel() // pattern.group
    broken = data.draw(st.sets(st.integers(0, groups - 1), min_size=1))
    for group in broken:
        mask.view(-1)[group * pattern.group : (group + 1) * pattern.group] = True
    row, column = divmod(min(broken) * pattern.group, mask.shape[1])
    text = refusal(weight, mask, pattern)
    assert f"{len(broken)} of {groups} groups; first: row {row}, columns {column}.." in text


@quick
@given(pruned(), st.data(), st.sampled_from([1e-3, -2.0, 1e-41]))
def test_weight_off_the_mask_is_rejected(case, data, value):
    """A weight off the mask, however small, is refused with its place and value."""
    pattern, mask, weight = case
    row, column = draw_place(data, ~mask)
    weight[row, column] = value
    text = refusal(weight, mask, pattern)
    assert f"1 non-zero weights off the mask in {LAYER}; first: row {row}, column {column} is " in text
    assert float(re.search(r"is (\S+) instead of 0", text)[1]) == pytest.approx(value, rel=1e-4)


@quick
@given(pruned(), st.data())
def test_negative_zero_off_the_mask_is_rejected(case, data):
    """A zero off the mask must be positive; a kept weight may be a zero of either sign."""
    pattern, mask, weight = case
    weight[draw_place(data, mask)] = -0.0
    check(weight, mask, pattern)
    weight[draw_place(data, ~mask)] = -0.0
    assert "1 negative zeros off the mask" in refusal(weight, mask, pattern)


@quick
@given(pruned(), st.data(), st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_non_finite_weight_is_rejected(case, data, value):
    """A NaN or infinite weight is refused, on the mask as off it."""
    pattern, mask, weight = case
    weight[draw_place(data, torch.ones_like(mask))] = value
    assert "NaN or infinite" in refusal(weight, mask, pattern)


@quick
@given(pruned(), st.data())
def test_extra_zeros_are_counted(case, data):
    """Zeros under the mask are allowed; the proof counts each, apart from the pruned ones."""
    pattern, mask, weight = case
    weight[mask] = 1.5
    zeroed = data.draw(st.sets(st.sampled_from([tuple(place) for place in mask.nonzero().tolist()])))
    for place in zeroed:
        weight[place] = 0.0
    proof = check(weight, mask, pattern)
    assert proof["extra_zeros"] == len(zeroed)
    assert proof["zeros"] == int((~mask).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64])
def test_mask_of_another_dtype_is_rejected(dtype):
    """A mask that is right in numbers but not bool is refused, naming its dtype."""
    mask = TWO_FOUR.top(torch.randn(2, 8))
    assert f"a mask of {dtype} instead of torch.bool" in refusal(torch.zeros(2, 8), mask.to(dtype), TWO_FOUR)


def test_mask_that_is_no_tensor_is_rejected():
    """A mask that is no tensor is refused, naming what it is."""
    assert "a mask of list instead of torch.bool" in refusal(torch.zeros(1, 4), [True, True, False, False], TWO_FOUR)


@pytest.mark.parametrize("shape", [(8, 2), (1, 8), (2, 4), (16,), (1, 2, 8)])
def test_mask_of_another_shape_is_rejected(shape):
    """A mask of any shape but the weight's is refused, naming both shapes."""
    text = refusal(torch.zeros(2, 8), torch.ones(shape, dtype=torch.bool), TWO_FOUR)
    assert f"a mask of shape {shape} instead of (2, 8)" in text


def test_missing_and_extra_layers_are_rejected():
    """Masks need exactly the names of the layers; the error names the first wrong one."""
    mask = TWO_FOUR.top(torch.randn(2, 8))
    shapes, both = {"a": (2, 8), "b": (2, 8)}, {"a": TWO_FOUR, "b": TWO_FOUR, "c": TWO_FOUR}
    check_masks({"b": mask, "a": mask}, both, shapes, "acme")
    with pytest.raises(NotStrict, match="acme returned no mask for 1 of 2 layers; first: b"):
        check_masks({"a": mask}, both, shapes, "acme")
    with pytest.raises(NotStrict, match="acme returned a mask for c, which is not a prunable layer"):
        check_masks({"a": mask, "b": mask, "c": mask}, both, shapes, "acme")


def test_layers_may_have_patterns_of_their_own():
    """Each layer is checked against its own pattern, and the proof adds up all layers."""
    both = {"a": Pattern(2, 4), "b": Pattern(1, 8)}
    weights = {"a": torch.rand(2, 8) + 1, "b": torch.rand(3, 16) + 1}
    chosen = {name: both[name].top(weight) for name, weight in weights.items()}
    live = {name: weight.masked_fill(~chosen[name], 0.0) for name, weight in weights.items()}
    proof = check_strict(live, chosen, both, "acme")
    assert proof == {
        "layers": 2,
        "groups": 4 + 6,
        "weights": 16 + 48,
        "zeros": 8 + 42,
        "extra_zeros": 0,
        "masks_digest": masks_digest(chosen),
    }
    with pytest.raises(NotStrict, match="broke 1:8 in a"):
        check_strict(live, chosen, {"a": Pattern(1, 8), "b": Pattern(1, 8)}, "acme")


def test_layer_whose_rows_do_not_divide_is_refused():
    """A layer that M does not divide is named with its inputs and a remedy that the user can copy."""
    both = {"model.layers.0.self_attn.q_proj": TWO_FOUR, "model.layers.0.mlp.up_proj": TWO_FOUR, "c": TWO_FOUR}
    shapes = dict(zip(both, [(8, 130), (8, 8), (8, 6)], strict=True))
    with pytest.raises(NMBenchError) as caught:
        check_divides(both, shapes)
    assert str(caught.value) == (
        "layer model.layers.0.self_attn.q_proj has 130 inputs, not a multiple of 4 (2 of 3 layers); exclude it with "
        "--skip 'q_proj' or choose another pattern."
    )


@quick
@given(st.dictionaries(st.sampled_from("abcd"), st.tuples(patterns(), st.integers(1, 64)), min_size=1))
def test_check_divides_refuses_exactly_what_does_not_divide(layers):
    """The check passes exactly when every layer's own M divides its inputs, and else names the first that fails."""
    chosen = {name: pattern for name, (pattern, _) in layers.items()}
    shapes = {name: (3, inputs) for name, (_, inputs) in layers.items()}
    broken = [name for name, (pattern, inputs) in layers.items() if inputs % pattern.group]
    if not broken:
        check_divides(chosen, shapes)
        return
    with pytest.raises(NMBenchError, match=f"layer {broken[0]} has {shapes[broken[0]][1]} inputs"):
        check_divides(chosen, shapes)


@quick
@given(pruned(), st.data())
def test_digest_names_masks(case, data):
    """The digest of masks ignores their order and layout, and changes with any bit, name or shape."""
    _, mask, _ = case
    digest = masks_digest({"a": mask, "b": ~mask})
    assert digest == masks_digest({"b": ~mask, "a": mask.t().contiguous().t()})
    flipped = mask.clone()
    flipped[draw_place(data, torch.ones_like(mask))] ^= True
    others = [{"a": flipped, "b": ~mask}, {"a": mask, "c": ~mask}, {"a": mask}, {"a": mask[:, None], "b": ~mask}]
    assert digest not in {masks_digest(other) for other in others}
    assert re.fullmatch("[0-9a-f]{16}", digest)


@quick
@given(st.data())
def test_any_strict_mask_is_accepted(data):
    """A strict mask passes whatever the method it came from, on all-zero weights too, where every kept one is extra."""
    pattern = data.draw(patterns())
    mask = data.draw(masks(pattern))
    assert check(torch.zeros(mask.shape), mask, pattern)["extra_zeros"] == int(mask.sum())


def test_a_torn_unit_is_named():
    """A mask that keeps N of M weights, but not in whole units, is refused with its group and the unit."""
    weight, pattern = torch.ones(2, 16), Pattern.parse("2:4x2")
    mask = pattern.top(weight)
    mask[1, 8:16] = torch.tensor([0, 1, 1, 1, 1, 0, 0, 0], dtype=torch.bool)
    text = refusal(weight.masked_fill(~mask, 0.0), mask, pattern)
    assert (
        "broke 2:4x2" in text and "1 of 4 groups; first: row 1, columns 8..15 keep 4 not in whole units of 2." in text
    )
    check(weight.masked_fill(~mask, 0.0), mask, Pattern(4, 8))
