"""Runs the laws on a method: as tests, one id per law, or as a plain function call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nmbench.errors import NMBenchError, unknown
from nmbench.methods import MaskLearner, Method, Refiner, Scorer, Solver
from nmbench.testing.failure import CheckFailed, failure_text
from nmbench.testing.laws import LAWS
from nmbench.testing.laws.base import KEPT, PASSED_OVER, Broken, Judgement, Law, NoCall, no_call
from nmbench.testing.watch import Seen, watch

CALLED = (Scorer, Solver, Refiner, MaskLearner)  # a `MaskSource` brings what is elsewhere: its class alone is checked


@dataclass
class Trial:
    """One method on trial; every call of it is made once and shown to all laws that ask for it."""

    method: Method
    calls: dict[Any, Seen] = field(default_factory=dict, repr=False)

    def seen(self, case: Any) -> Seen:
        if case not in self.calls:
            self.calls[case] = Seen(self.method, case) if isinstance(case, NoCall) else watch(self.method, case)
        return self.calls[case]


@dataclass(frozen=True)
class Check:
    """One law on one method; calling it raises `CheckFailed` if the law is broken."""

    law: Law = field(repr=False)
    trial: Trial

    @property
    def name(self) -> str:
        return self.law.name

    def __call__(self) -> None:
        __tracebackhide__ = True  # pytest then shows the failure text, not the kit
        judged = 0
        passed_over = []
        for case in self.law.cases(self.trial.method):
            seen = self.trial.seen(case)
            verdict = self.verdict(seen)
            if isinstance(verdict, Broken):
                raise CheckFailed(failure_text(self.law, seen, verdict))
            judged += verdict is KEPT
            passed_over += [seen] if verdict is PASSED_OVER else []
        if not judged:
            raise CheckFailed(failure_text(self.law, *nothing_judged(self.trial, passed_over)))

    def verdict(self, seen: Seen) -> Judgement:
        """What the law says; a method that fails when the law calls it again has broken it."""
        try:
            return self.law.judge(seen)
        except Exception as error:
            return Broken(f"{type(error).__name__}: {' '.join(str(error).split())}", "a result")


def nothing_judged(trial: Trial, passed_over: Sequence[Seen]) -> tuple[Seen, Broken]:
    """A check that had nothing to look at has not passed."""
    if not passed_over:
        return Seen(trial.method, NoCall()), Broken("no usual pattern is supported", "at least one, such as 2:4")
    seen = passed_over[0]
    got = f"{type(seen.error).__name__}: {seen.error}" if seen.error else "results that other checks refuse"
    return seen, Broken(f"{' '.join(got.split())}, in all {len(passed_over)} cases", "a result that can be judged")


def checks_of(method: Method | type[Method]) -> list[Check]:
    """All checks of a method, in the order of `docs/plugins/checks.md`; a class stands for its default options.

    Raises `NMBenchError` for what is no method.
    """
    made = method() if isinstance(method, type) else method
    if not isinstance(made, Method):
        raise NMBenchError(f"{made!r} is no method; derive it from nmbench.Scorer, Solver, Refiner or MaskLearner.")
    trial = Trial(made)
    return [
        Check(law, trial)
        for law in LAWS
        if isinstance(made, law.kinds)
        and (not law.option or hasattr(made, law.option))
        and (isinstance(made, CALLED) or law.cases is no_call)
    ]


def run_checks(method: Method | type[Method]) -> dict[str, str]:
    """Run all checks, for instance in a notebook: name of the check -> "" if it passed, else what is wrong."""
    return {check.name: outcome(check) for check in checks_of(method)}


def outcome(check: Check) -> str:
    try:
        check()
    except CheckFailed as failure:
        return str(failure)
    return ""


def conformance_tests(
    *methods: Method | type[Method], expected_failures: Mapping[str, str] | None = None
) -> Callable[[Check], None]:
    """Make a test function with one id per law: `test_acme = conformance_tests(Acme())` is a whole test file.

    `expected_failures` maps the name of a check to the reason why the method breaks it. They are strict: one that
    passes is a failure. Raises `NMBenchError` for the name of a check that does not exist or does not apply.
    """
    import pytest

    expected = dict(expected_failures or {})
    checks = [check for method in methods for check in checks_of(method)]
    refuse_unknown(expected, {check.name for check in checks})
    parameters = [
        pytest.param(check, id=label, marks=marks(check.name, expected)) for label, check in labelled(checks, methods)
    ]

    @pytest.mark.parametrize("check", parameters)
    def test_conforms(check: Check) -> None:
        """The method keeps the law that the id names."""
        __tracebackhide__ = True
        check()

    return test_conforms


def labelled(checks: Sequence[Check], methods: Sequence[Any]) -> Iterator[tuple[str, Check]]:
    """Ids: the law alone for one method, `Acme-law` for several of them."""
    for check in checks:
        prefix = f"{type(check.trial.method).__name__}-" if len(methods) > 1 else ""
        yield f"{prefix}{check.name}", check


def marks(name: str, expected: Mapping[str, str]) -> list[Any]:
    import pytest

    if name not in expected:
        return []
    return [pytest.mark.xfail(reason=expected[name], raises=CheckFailed, strict=True)]


def refuse_unknown(expected: Mapping[str, str], names: set[str]) -> None:
    for name, reason in expected.items():
        if name not in names:
            raise unknown("check", name, names, " in expected_failures")
        if not reason:
            raise NMBenchError(f"expected failure {name!r} needs a reason, so that others know why it is allowed.")


def law_names() -> tuple[str, ...]:
    """The names of all checks of all kinds."""
    return tuple(law.name for law in LAWS)
