"""Laws of every method: its side effects."""

from __future__ import annotations

from nmbench.methods import Method
from nmbench.testing.laws.base import HOLDS, Broken, Judgement, law, usual
from nmbench.testing.observation import Observation


@law(Method, cases=usual)
def inputs_are_untouched(observed: Observation) -> Judgement:
    """Weights, statistics, masks, tokens and the model are afterwards what they were before."""
    if observed.changed:
        return Broken(
            f"changed in place: {', '.join(observed.changed)}", "work on a copy, or inside `task.live_weights()`"
        )
    return HOLDS


@law(Method, cases=usual)
def global_random_state_is_untouched(observed: Observation) -> Judgement:
    """The global random states of Python, NumPy and torch are neither set nor drawn from."""
    if observed.random_moved:
        return Broken(f"moved: {', '.join(observed.random_moved)}", "a generator of its own, such as `task.generator`")
    return HOLDS


@law(Method, cases=usual)
def global_settings_are_untouched(observed: Observation) -> Judgement:
    """Default dtype and device, gradient mode, threads and precision of torch are left as they were."""
    if observed.settings_changed:
        return Broken(f"changed: {'; '.join(observed.settings_changed)}", "no change of what other methods depend on")
    return HOLDS


@law(Method, cases=usual)
def nothing_is_printed(observed: Observation) -> Judgement:
    """Nothing is written to standard output, which belongs to the table of results."""
    if observed.stdout:
        return Broken(
            f"printed {observed.stdout[:60]!r}", "no output; logging, a note in `Pruned` or `task.report` instead"
        )
    return HOLDS
