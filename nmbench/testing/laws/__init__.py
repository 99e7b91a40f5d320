"""The laws that a method must keep, by the kind of method they are about. `nmbench.testing.kit` runs them.

Every law judges one property and skips cases that break another law, so that a failure names the law that is broken.
"""

from __future__ import annotations

from nmbench.testing.laws import conduct, every, layerwise, learner, refiner, repair, results, scorer, solver
from nmbench.testing.laws.base import Law

MODULES = (every, results, conduct, layerwise, scorer, solver, refiner, learner, repair)
LAWS: tuple[Law, ...] = tuple(law for module in MODULES for law in vars(module).values() if isinstance(law, Law))
