"""The laws run on a method: as tests with one id per law, or as a plain function call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nmbench.errors import NMBenchError, unknown
from nmbench.methods import MaskLearner, Method, Refiner, Repair, Scorer, Solver
from nmbench.testing.failure import CheckFailed, failure_text
from nmbench.testing.laws import LAWS
from nmbench.testing.laws.base import HOLDS, SKIPPED, Broken, Judgement, Law, NoCall, no_call
from nmbench.testing.observation import Observation, observe

CALLED = (Scorer, Solver, Refiner, MaskLearner, Repair)  # a `MaskSource` reads files: only its class is checked


@dataclass
class MethodUnderTest:
    """One method, with its observed calls: every case is called once, and all laws judge the same observation."""

    method: Method
    calls: dict[Any, Observation] = field(default_factory=dict, repr=False)

    def observation(self, case: Any) -> Observation:
        if case not in self.calls:
            self.calls[case] = (
                Observation(self.method, case) if isinstance(case, NoCall) else observe(self.method, case)
            )
        return self.calls[case]


@dataclass(frozen=True)
class Check:
    """One law on one method; calling it raises `CheckFailed` if the law is broken."""

    law: Law = field(repr=False)
    tested: MethodUnderTest

    @property
    def name(self) -> str:
        return self.law.name

    def __call__(self) -> None:
        __tracebackhide__ = True  # pytest then shows the failure text, not the kit
        judged = 0
        skipped = []
        for case in self.law.cases(self.tested.method):
            observed = self.tested.observation(case)
            verdict = self.verdict(observed)
            if isinstance(verdict, Broken):
                raise CheckFailed(failure_text(self.law, observed, verdict))
            judged += verdict is HOLDS
            skipped += [observed] if verdict is SKIPPED else []
        if not judged:
            raise CheckFailed(failure_text(self.law, *nothing_judged(self.tested, skipped)))

    def verdict(self, observed: Observation) -> Judgement:
        """The judgement of the law. An error counts as `Broken`: the law may call the method again, which may fail."""
        try:
            return self.law.judge(observed)
        except Exception as error:
            return Broken(f"{type(error).__name__}: {' '.join(str(error).split())}", "a result")


def nothing_judged(tested: MethodUnderTest, skipped: Sequence[Observation]) -> tuple[Observation, Broken]:
    """The observation and the failure of a check that skipped all its cases: such a check has not passed."""
    if not skipped:
        return Observation(tested.method, NoCall()), Broken(
            "no usual pattern is supported", "at least one, such as 2:4"
        )
    observed = skipped[0]
    got = f"{type(observed.error).__name__}: {observed.error}" if observed.error else "results that other checks refuse"
    return observed, Broken(f"{' '.join(got.split())}, in all {len(skipped)} cases", "a result that can be judged")


def checks_of(method: Method | type[Method]) -> list[Check]:
    """All checks of a method, in the order of `docs/plugins/checks.md`; a class stands for its default options.

    Raises `NMBenchError` if `method` is not a `Method`.
    """
    made = method() if isinstance(method, type) else method
    if not isinstance(made, Method):
        raise NMBenchError(
            f"{made!r} is no method; derive it from nmbench.Scorer, Solver, Refiner, MaskLearner or a repair."
        )
    tested = MethodUnderTest(made)
    return [
        Check(law, tested)
        for law in LAWS
        if isinstance(made, law.kinds)
        and (not law.option or hasattr(made, law.option))
        and (isinstance(made, CALLED) or law.cases is no_call)
    ]


def run_checks(method: Method | type[Method]) -> dict[str, str]:
    """Run all checks, for instance in a notebook: name of the check -> "" if it passed, else the failure text."""
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

    `expected_failures` maps the name of a check to the reason why the method breaks the law. An expected failure that
    passes is a failure. Raises `NMBenchError` for the name of a check that does not exist or does not apply, and for an
    empty reason.
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
    """Checks with their ids: the name of the law for one method, `Acme-law` for several methods."""
    for check in checks:
        prefix = f"{type(check.tested.method).__name__}-" if len(methods) > 1 else ""
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
