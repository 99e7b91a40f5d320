"""What the source of transformers models suggests for a run."""

import pytest

from nmbench_plugins.huggingface import defaults_of
from nmbench_plugins.tiny import TinyModel


@pytest.mark.parametrize(("context", "window"), [(256, 256), (131072, 2048)])
def test_two_texts_in_windows_of_the_model(context, window):
    """Both test texts are read in windows of 2048 tokens, or of the whole context of a model that has less."""
    bundle = TinyModel().load("llama")
    bundle.model.config.max_position_embeddings = context
    found = defaults_of(bundle)
    assert found.window_tokens == window
    assert found.metrics == (f"ppl:wikitext2@{window}", f"ppl:c4@{window}")
