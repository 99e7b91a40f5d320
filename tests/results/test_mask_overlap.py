"""Laws of the overlap of masks: counted as packed bits, equal to a count of bools."""

import pytest

from nmbench.errors import NMBenchError
from nmbench.results.mask_overlap import mask_overlap
from reference.run_directory import record_of, write_masks


def test_overlap_by_its_definition(tmp_path):
    """The share of kept weights in common is that of a count over bools; of a mask with itself it is 1."""
    rows = [record_of(label) for label in "abc"]
    masks = [write_masks(tmp_path, row, seed) for seed, row in enumerate(rows)]
    found = mask_overlap([tmp_path / f"masks/{row['label']}--2-4--seed0.safetensors" for row in rows])
    for first, ours in enumerate(masks):
        for second, theirs in enumerate(masks):
            both = sum(int((mask & theirs[name]).sum()) for name, mask in ours.items())
            assert found[first, second] == pytest.approx(both / sum(int(mask.sum()) for mask in ours.values()))


def test_masks_of_other_layers_are_refused(tmp_path):
    """Masks of two models have no overlap, and the error names the files."""
    rows = [record_of("a"), record_of("b")]
    write_masks(tmp_path, rows[0], 0)
    write_masks(tmp_path, rows[1], 1, layers=3)
    with pytest.raises(NMBenchError, match="of other layers"):
        mask_overlap([tmp_path / f"masks/{row['label']}--2-4--seed0.safetensors" for row in rows])
