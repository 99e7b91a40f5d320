"""Tests of the kit itself: every check fails a method that breaks its law, and only such a method."""

from __future__ import annotations

import contextlib
import io
import random
import re
from pathlib import Path

import pytest
import torch

import nmbench as nm
from nmbench.errors import NMBenchError, UnknownName
from nmbench.testing import CheckFailed, LayerCase, LearnCase, checks_of, conformance_tests, run_checks
from nmbench.testing.kit import law_names, outcome
from nmbench.testing.laws import LAWS
from nmbench.testing.laws.learner import TURN
from nmbench.testing.observation import observe
from nmbench.testing.planted import planted_bundle, strongest
from reference import broken_methods as zoo
from reference import broken_repairs, repairs

TESTS = Path(__file__).parents[1]
GOOD = (*zoo.GOOD, repairs.Rescale(), repairs.Nearer(), repairs.Tune())
KINDS = (nm.Scorer, nm.Solver, nm.Refiner, nm.MaskLearner, nm.LayerRepair, nm.BlockRepair, nm.WeightLearner)
ALL = [(law, method) for broken in (zoo.BROKEN, broken_repairs.BROKEN) for law in broken for method in broken[law]]
TEXT = re.compile(
    r"(?P<cls>\w+) breaks (?P<law>\w+): .+\n  call:     .+\n  got:      .+\n  expected: .+\n"
    r"  see it with:\n(?P<code>(    .+\n?)+)"
)


def failures(method, *laws):
    """The failed checks of a method, of all or of some laws. Running checks restores the state of the process, whatever
    a method does to it.
    """
    before = process_state()
    found = {check.name: outcome(check) for check in checks_of(method) if check.name in laws} or run_checks(method)
    failed = {name: text for name, text in found.items() if text}
    assert process_state() == before
    return failed


def every(cases):
    """One case of every kind of method; the others are slow tests."""
    kinds: set[type] = set()
    for law, method in cases:
        (kind,) = [kind for kind in KINDS if isinstance(method, kind)]
        yield pytest.param(law, method, marks=[pytest.mark.slow] if kind in kinds else [])
        kinds.add(kind)


def process_state():
    return torch.get_rng_state().tolist(), random.getstate(), torch.get_default_dtype(), torch.get_num_threads()


def named(value):
    return value if isinstance(value, str) else type(value).__name__


@pytest.mark.parametrize("method", GOOD, ids=named)
def test_good_methods_keep_every_law(method):
    """A method that breaks no law passes every check."""
    assert failures(method) == {}


@pytest.mark.parametrize(("law", "method"), ALL, ids=named)
def test_a_broken_method_fails_its_check(law, method):
    """The failure text of a broken method has the call, the result, the expected result, and code that runs."""
    failure = failures(method, law)[law]
    text = TEXT.fullmatch(failure)
    assert text, failure
    assert (text["cls"], text["law"]) == (type(method).__name__, law)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        outcome = attempt(text["code"])
    assert printed.getvalue() or isinstance(outcome, Exception)


@pytest.mark.parametrize(("law", "method"), list(every(ALL)), ids=named)
def test_a_broken_method_fails_no_other_check(law, method):
    """Every broken method keeps all other laws."""
    assert list(failures(method)) == [law]


def attempt(code: str) -> Exception | None:
    """Run the code of a failure text; return the error that the broken method raises, if any."""
    dtype = torch.get_default_dtype()
    try:
        exec("\n".join(line[4:] for line in code.splitlines()), {})
    except (NMBenchError, ZeroDivisionError, RuntimeError) as error:
        return error
    finally:
        torch.set_default_dtype(dtype)
    return None


def test_every_check_has_a_broken_method():
    """Every check has a method that fails it."""
    assert {law for law, _ in ALL} == set(law_names())
    assert len(law_names()) == len(set(law_names())) == len(LAWS)


def test_every_law_is_one_sentence():
    """The sentence of every law begins and ends like a sentence."""
    for law in LAWS:
        assert law.sentence[0].isupper() or law.sentence.startswith("`"), law.name
        assert law.sentence.endswith("."), law.name


def test_a_check_with_nothing_to_judge_has_not_passed():
    """A method that always raises fails every check that calls it."""

    class Raising(zoo.GoodSolver):
        """Raises."""

        def solve(self, weight, stats, pattern):
            raise ValueError("never")

    failed = failures(Raising())
    calls = [check.name for check in checks_of(zoo.GoodSolver())]
    about_the_class = {"options_round_trip", "options_are_described", "impossible_patterns_have_reasons"}
    of_the_process = {name for name in calls if name.endswith("_untouched") or name == "nothing_is_printed"}
    assert set(failed) == set(calls) - about_the_class - of_the_process


def test_the_sign_of_a_zero_is_a_change():
    """A method that turns -0.0 into 0.0 in place has changed its input, though the two compare as equal."""

    class Unsigning(zoo.GoodScorer):
        """Takes absolute values in place."""

        def score(self, weight, stats):
            return weight.abs_()

    assert observe(Unsigning(), LayerCase(kind="signed zeros")).changed == ["weight"]
    assert observe(zoo.GoodScorer(), LayerCase(kind="signed zeros")).changed == []


def test_no_supported_pattern_is_no_pass():
    """A method that supports no pattern fails every check that calls it."""

    class Nothing(zoo.GoodScorer):
        """Supports nothing."""

        def supports(self, pattern):
            return "it never does."

    failed = failures(Nothing())
    assert "supported_patterns_are_done" in failed
    assert "no usual pattern is supported" in failed["scores_are_finite"]


def test_which_checks_a_kind_has():
    """Each kind has its own checks and those of every method; a check of option `steps` needs that option."""
    names = {type(method).__name__: {check.name for check in checks_of(method)} for method in GOOD}
    assert "scores_are_finite" in names["GoodScorer"] - names["GoodSolver"] - names["GoodLearner"]
    assert "repair_does_not_hurt" in names["GoodSolver"] - names["GoodRefiner"]
    assert "zero_steps_return_the_initial_mask" in names["GoodLearner"]
    assert "the_mask_stays" in names["Rescale"] & names["Tune"] - names["Nearer"] - names["GoodSolver"]
    assert "zero_steps_return_the_start" in names["Nearer"] & names["Tune"] - names["Rescale"]
    assert set.intersection(*names.values()) == {
        law.name for law in LAWS if len(law.kinds) == 1 and law.kinds[0].__name__ == "Method"
    }
    assert "hostile_values_are_survived" not in names["GoodLearner"]


def test_what_is_no_method():
    """Only methods can be checked; a class stands for its default options."""
    assert len(checks_of(zoo.GoodScorer)) == len(checks_of(zoo.GoodScorer()))
    with pytest.raises(NMBenchError, match="is no method; derive it from"):
        checks_of(3)


@pytest.mark.parametrize(("turn", "text"), [(TURN, "another mask of"), (0.0, "")])
def test_a_forgotten_selection_shows_where_losses_turn(turn, text, monkeypatch):
    """A learner that loses its best masks at a kill ends with the same ones while every look is better than before."""
    monkeypatch.setattr("nmbench.testing.laws.learner.TURN", turn)
    (check,) = (check for check in checks_of(zoo.Undecided()) if check.name == "interrupted_runs_resume")
    with pytest.raises(CheckFailed, match=text) if text else contextlib.nullcontext():
        check()


def test_losses_on_selection_windows_turn():
    """Below the turn a selection loss rises by as much as it would fall; losses on the pool stay what they are."""
    plain, turned = LearnCase(), LearnCase(turn=1.5)
    bundle = planted_bundle()
    best = strongest(bundle, plain.patterns(bundle.layers))
    for case, low in ((turned, 2.0), (plain, 0.0)):
        task = case.task()
        with task.live_weights() as live, torch.no_grad():
            live.apply(best)
            assert float(task.loss(task.pool).mean()) < 0.1
            assert low <= float(task.loss(task.selection).mean()) < low + 1


def test_cases_are_what_their_repr_says():
    """The repr of a case makes an equal case with equal numbers."""
    for case in (LayerCase("4:8", "ties", 3, 2, 5, "bfloat16", "correlated"), LearnCase("2:4", "4:8", 3)):
        assert eval(repr(case)) == case
    a, b = LayerCase(kind="ties"), LayerCase(kind="ties")
    assert torch.equal(a.weight(), b.weight())
    assert torch.equal(a.mask(), b.mask())


# As tests


CONFORMING = """
from nmbench.testing import conformance_tests
from reference.broken_methods import GoodScorer, {broken}
test_it = conformance_tests(GoodScorer(), {broken}(), expected_failures={expected!r})
"""


def test_one_line_gives_one_id_per_law(python, tmp_path):
    """Ids name method and law; an expected failure is an xfail, and an expected failure that passes is a failure."""
    expected = {"channel_signs_do_not_matter": "it takes small for negative"}
    (tmp_path / "test_mine.py").write_text(CONFORMING.format(broken="Signed", expected=expected))
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {TESTS}\n")
    report = python.run("-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "test_mine.py", cwd=tmp_path).stdout
    assert "PASSED test_mine.py::test_it[GoodScorer-scores_are_finite]" in report
    assert "XFAIL test_mine.py::test_it[Signed-channel_signs_do_not_matter] - it takes small for negative" in report
    assert "FAILED test_mine.py::test_it[GoodScorer-channel_signs_do_not_matter]" in report  # it passes, strictly
    assert re.search(r"1 failed, 36 passed, 1 xfailed", report), report


@pytest.mark.parametrize(
    ("expected", "error", "message"),
    [
        ({"scores_are_finit": "x"}, UnknownName, "unknown check 'scores_are_finit'.*Did you mean 'scores_are_finite'"),
        ({"weights_are_finite": "of solvers"}, UnknownName, "unknown check 'weights_are_finite'"),
        ({"scores_are_finite": ""}, NMBenchError, "needs a reason"),
    ],
)
def test_expected_failures_are_checked(expected, error, message):
    """A declared failure must name a check that applies, and give a reason."""
    with pytest.raises(error, match=message):
        conformance_tests(zoo.GoodScorer(), expected_failures=expected)


def test_a_failure_is_an_assertion():
    """Outside pytest, a check is a function that raises."""
    check = next(check for check in checks_of(zoo.Signed()) if check.name == "channel_signs_do_not_matter")
    with pytest.raises(CheckFailed, match="Signed breaks channel_signs_do_not_matter"):
        check()
