"""A kit for testing pruning methods: `test_acme = conformance_tests(Acme())` is a test file with one id per law.

| | |
|---|---|
| `conformance_tests`, `run_checks` | the checks as tests (needs pytest), or as a plain function call |
| `LayerCase`, `LearnCase` | the inputs of the checks; failure texts name them, so that you can repeat a call |
| `nmbench.testing.strategies` | Hypothesis strategies for laws of your own (needs hypothesis) |
| `nmbench.testing.planted` | a model with a planted answer, and tasks to learn its masks |
| `nmbench.testing.models` | tiny random models of real architectures |

`pip install "nmbench[test]"` brings pytest and hypothesis. `docs/plugins/checks.md` lists the laws.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nmbench.testing.cases import LayerCase as LayerCase
    from nmbench.testing.cases import LearnCase as LearnCase
    from nmbench.testing.failure import CheckFailed as CheckFailed
    from nmbench.testing.kit import checks_of as checks_of
    from nmbench.testing.kit import conformance_tests as conformance_tests
    from nmbench.testing.kit import run_checks as run_checks

KIT_VERSION = "1.2"  # docs/plugins/compatibility.md says what a new number means
WHERE = {
    "CheckFailed": "failure",
    "LayerCase": "cases",
    "LearnCase": "cases",
    "checks_of": "kit",
    "conformance_tests": "kit",
    "run_checks": "kit",
}
__all__ = sorted([*WHERE, "KIT_VERSION"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module 'nmbench.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"nmbench.testing.{WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
