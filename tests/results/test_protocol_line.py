"""Laws of the line that describes a run: the kinds of pruned layers are named with their shares."""

from nmbench.results.protocol_line import composition


def record(coverage):
    return {"coverage": coverage}


def test_kinds_are_shares_of_the_pruned_weights():
    """Shares are of the pruned weights; the dense row, and records without kinds, say nothing."""
    extent = {"layers": 2, "weights": 400, "share_of_decoder": 0.9}
    kinds = {"kinds": {"mlp": 300, "attention": 100}}
    assert list(composition([record(None), record({**extent, **kinds})])) == ["pruned: mlp 75.0%, attention 25.0%"]
    assert list(composition([record(None), record(extent)])) == []
