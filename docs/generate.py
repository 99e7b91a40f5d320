"""Writes hooks.md and checks.md of `plugins/` from the code: `python docs/generate.py`.

A test fails if they are out of date.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from nmbench.plugins.checking import BASES, known_hooks
from nmbench.plugins.hookspecs import HOOKS_VERSION
from nmbench.testing import KIT_VERSION
from nmbench.testing.laws import MODULES
from nmbench.testing.laws.base import Law

HERE = Path(__file__).parent / "plugins"
HEAD = "<!-- made by docs/generate.py; do not edit -->"
KINDS = {
    "every": "method: options and patterns",
    "results": "method: what it returns",
    "conduct": "method: what else it does",
    "layerwise": "one-shot method",
    "learner": "mask learner",
    "repair": "repair",
}


def main() -> None:
    for name, text in pages().items():
        (HERE / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    return {"hooks.md": hooks(), "checks.md": checks()}


def hooks() -> str:
    """Every hook with its parameters, when it is called, and what may be registered through it."""
    announcing = {name: spec for name, spec in known_hooks().items() if name in BASES}
    observing = {name: spec for name, spec in known_hooks().items() if name not in BASES}
    parts = [HEAD, "# Hooks", f"Version {HOOKS_VERSION}. Mark an implementation with `@nmbench.hookimpl`."]
    parts += ["## Announcing", "Called once per plugin, when it is loaded and before any model exists."]
    parts += [section(name, spec) for name, spec in announcing.items()]
    parts += ["## Observing", "Called while a run goes on; what they return is ignored."]
    parts += [section(name, spec) for name, spec in observing.items()]
    return "\n\n".join(parts) + "\n"


def section(name: str, spec: object) -> str:
    """One hook."""
    signature = inspect.signature(spec)  # type: ignore[arg-type]
    parameters = ", ".join(f"{p.name}: {p.annotation}" for p in signature.parameters.values())
    doc = inspect.cleandoc(spec.__doc__ or "")
    takes = ", ".join(f"`nmbench.{base.__name__}`" for base in BASES[name]) if name in BASES else ""
    lines = [f"### {name}", f"`{name}({parameters})`", doc]
    return "\n\n".join([*lines, f"Takes classes derived from {takes}."] if takes else lines)


def checks() -> str:
    """Every law of the kit, by the methods it is about."""
    parts = [HEAD, "# Checks", f"Version {KIT_VERSION}. The names are pytest ids, and the keys of `expected_failures`."]
    for module in MODULES:
        short = module.__name__.rpartition(".")[2]
        parts.append(f"## Of every {KINDS.get(short, short)}")
        laws = [law for law in vars(module).values() if isinstance(law, Law)]
        parts.append("\n".join(["| | |", "|---|---|", *(f"| `{law.name}` | {law.sentence} |" for law in laws)]))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
