"""Laws of the choice of an engine: nothing is replaced in silence."""

import pytest

from nmbench.errors import NMBenchError
from nmbench_plugins.maskpro.engines import choose
from nmbench_plugins.maskpro.tracker import Rule
from reference.planted import make

RULE = Rule(learning_rate=3.0, prior=2.0, decay=0.99, normalise=False)


@pytest.mark.parametrize(
    ("engine", "logits", "message"),
    [("streamed", "float32", "engine=streamed is impossible: the device is cpu"), ("auto", "float16", "use float32")],
)
def test_impossible_engines(engine, logits, message):
    """An engine or a type of logits that this machine does not offer is refused by name, never replaced."""
    task = make()
    with task.live_weights() as live, pytest.raises(NMBenchError, match=message):
        choose(task, live, RULE, engine, logits)


@pytest.mark.parametrize(("engine", "note"), [("auto", "the device is cpu"), ("torch", "acme.engine=torch")])
def test_fallback_says_why(engine, note):
    """Without fused kernels plain torch computes the steps, and says so."""
    task = make()
    with task.live_weights() as live:
        chosen = choose(task, live, RULE, engine, "float32")
    assert (chosen.name, chosen.note) == ("torch", note)
