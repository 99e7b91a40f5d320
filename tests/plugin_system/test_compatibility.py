"""The written promise: hooks and checks are those of the version numbers; a change of theirs changes a number.

When one of these fails on purpose, raise the number as docs/plugins/compatibility.md says, and list what it now
stands for.
"""

from __future__ import annotations

import inspect

from nmbench.plugins.checking import known_hooks
from nmbench.plugins.hookspecs import HOOKS_VERSION
from nmbench.testing import KIT_VERSION
from nmbench.testing.kit import law_names

HOOKS = {
    "1.1": {
        "nmbench_register_baselines": ["register"],
        "nmbench_register_mask_learners": ["register"],
        "nmbench_register_models": ["register"],
        "nmbench_register_datasets": ["register"],
        "nmbench_register_metrics": ["register"],
        "nmbench_register_reporters": ["register"],
        "nmbench_run_started": ["spec", "memory", "doubts"],
        "nmbench_progress": ["event"],
        "nmbench_method_finished": ["record"],
        "nmbench_run_finished": ["records"],
    },
}
HOOKS["1.2"] = {**HOOKS["1.1"], "nmbench_register_repairs": ["register"]}
HOOKS["1.3"] = {**HOOKS["1.2"], "nmbench_run_started": ["spec", "memory", "doubts", "directory", "rows"]}
CHECKS = {
    "1.0": """
        options_round_trip options_are_described impossible_patterns_have_reasons supported_patterns_are_done
        results_have_the_right_shape results_have_the_right_dtype results_are_on_the_right_device inputs_are_untouched
        same_seed_same_result global_random_state_is_untouched global_settings_are_untouched nothing_is_printed
        hostile_values_are_survived half_precision_is_done masks_are_strict
        scores_are_finite row_order_does_not_matter channel_order_does_not_matter channel_signs_do_not_matter
        scale_does_not_matter
        weights_are_zero_off_the_mask weights_are_finite repair_does_not_hurt
        masks_do_not_get_worse weights_stay_dense
        learnt_masks_are_strict reported_masks_are_strict zero_steps_return_the_initial_mask planted_problem_improves
        interrupted_runs_resume tokens_are_counted
    """
}
CHECKS["1.1"] = f"""{CHECKS["1.0"]}
    the_mask_stays dropped_weights_stay_zero repaired_weights_are_finite repairs_improve_their_start
    zero_steps_return_the_start interrupted_repairs_resume parts_of_a_minibatch_do_not_matter
"""
CHECKS["1.2"] = f"""{CHECKS["1.1"]} blockwise_learners_stream"""


def test_hooks_are_those_of_their_version():
    """Hooks and their parameters do not change without a new number."""
    assert {name: list(inspect.signature(spec).parameters) for name, spec in known_hooks().items()} == HOOKS[
        HOOKS_VERSION
    ]


def test_checks_are_those_of_their_version():
    """Checks do not come or go without a new number."""
    assert sorted(law_names()) == sorted(CHECKS[KIT_VERSION].split())
