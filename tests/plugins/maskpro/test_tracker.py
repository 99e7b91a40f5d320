"""Laws of the tracker: the size of an update."""

import pytest
import torch

from nmbench_plugins.maskpro.tracker import Rule, Tracker


def test_normalised_steps_do_not_depend_on_the_scale_of_the_loss():
    """With `normalise`, the first advantage is the sign of the first residual, whatever its size."""
    for residual in (1e-3, -7.0):
        tracker = Tracker(Rule(learning_rate=2.0, prior=1.0, decay=0.99, normalise=True), torch.device("cpu"))
        tracker.take(torch.full((3,), 1.0 + residual), torch.ones(3))
        assert float(tracker.scale) == pytest.approx(-2 if residual > 0 else 2)
        assert tracker.figures().baseline == pytest.approx(0.01 * residual, rel=1e-3)
