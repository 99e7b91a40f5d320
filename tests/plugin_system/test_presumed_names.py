"""The names that the host itself presumes are registered by the built-in plugins."""

from __future__ import annotations

from nmbench import spec
from nmbench.plugins.loading import load_plugins


def test_presumed_names_are_registered():
    """Model, folder, calibration, test text, metric and start of the defaults exist."""
    found = load_plugins().registries
    assert spec.MODEL in found.models and spec.TINY in found.models and spec.MODEL_FOLDER in found.models
    assert {spec.CALIBRATION, *spec.TEST_TEXTS} <= {entry.name for entry in found.datasets}
    assert spec.PERPLEXITY in found.metrics
    assert spec.START in found.methods
