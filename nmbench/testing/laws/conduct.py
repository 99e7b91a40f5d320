"""Laws of every method: what else it does."""

from __future__ import annotations

from nmbench.methods import Method
from nmbench.testing.laws.base import KEPT, Broken, Judgement, law, usual
from nmbench.testing.watch import Seen


@law(Method, cases=usual)
def inputs_are_untouched(seen: Seen) -> Judgement:
    """Weights, statistics, masks, tokens and the model are afterwards what they were before."""
    if seen.changed:
        return Broken(f"changed in place: {', '.join(seen.changed)}", "work on a copy, or inside `task.live_weights()`")
    return KEPT


@law(Method, cases=usual)
def global_random_state_is_untouched(seen: Seen) -> Judgement:
    """The global random states of Python, NumPy and torch are neither set nor drawn from."""
    if seen.random_moved:
        return Broken(f"moved: {', '.join(seen.random_moved)}", "a generator of its own, such as `task.generator`")
    return KEPT


@law(Method, cases=usual)
def global_settings_are_untouched(seen: Seen) -> Judgement:
    """Default dtype and device, gradient mode, threads and precision of torch are left as they were."""
    if seen.settings_changed:
        return Broken(f"changed: {'; '.join(seen.settings_changed)}", "no change of what other methods depend on")
    return KEPT


@law(Method, cases=usual)
def nothing_is_printed(seen: Seen) -> Judgement:
    """Nothing is written to standard output, which belongs to the table of results."""
    if seen.stdout:
        return Broken(f"printed {seen.stdout[:60]!r}", "silence; logging, a note in `Pruned` or `task.report` instead")
    return KEPT
