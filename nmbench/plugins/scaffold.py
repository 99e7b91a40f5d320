"""Writes a plugin package that builds, installs and passes its own tests: `nmbench new-plugin`.

The files come from `nmbench/plugins/templates`, where `%{name}` and its like stand for what differs.
"""

from __future__ import annotations

import importlib.resources
import keyword
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nmbench.errors import NMBenchError

TEMPLATES = "nmbench.plugins.templates"
LONGEST = 40
FILES = {
    "pyproject.toml": "pyproject.toml",
    "tox.ini": "tox.ini",
    "tests.yml": ".github/workflows/tests.yml",
    "gitignore": ".gitignore",
}
FILES_OF = {  # what it registers -> the files that only such a package has
    "method": {"README.md": "README.md", "test_conformance.py": "tests/test_conformance.py"},
    "metric": {"metric_README.md": "README.md", "test_metric.py": "tests/test_metric.py"},
}


@dataclass(frozen=True)
class Kind:
    """What packages of one kind have of their own; NAME stands for the name of the plugin.

    `word`: what people call it; `registers`: a method or a metric; `options`: those that its tests give it; `run`: the
    flags of a comparison that it takes part in; `show`: the command that shows what nmbench knows of it.
    """

    word: str
    registers: str = "method"
    options: str = ""
    run: str = "--method NAME --method wanda"
    show: str = "nmbench methods NAME"


KINDS = {
    "scorer": Kind("scorer"),
    "solver": Kind("solver"),
    "refiner": Kind("refiner"),
    "learner": Kind("mask learner", options="steps=300", run="--method NAME --method wanda --set NAME.steps=50"),
    "metric": Kind("metric", "metric", run="--method wanda --metric NAME:demo@256", show="nmbench plugins"),
}


def new_plugin(name: str, kind: str, parent: Path, taken: str | None = None) -> list[Path]:
    """Write the package `nmbench-NAME` into a new folder of that name in `parent`; return its files.

    `taken` is the plugin that has a method or metric of this name already. Raises `NMBenchError` for a bad or taken
    name, and if there is something of the folder's name, which is then left as it is.
    """
    check_name(name, kind, taken)
    folder = parent / f"nmbench-{name}"
    if folder.exists() or folder.is_symlink():
        raise NMBenchError(f"{folder} exists and is left as it is; choose another name or --out, or remove it.")
    written = []
    for target, text in list(contents(name, kind)):
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def check_name(name: str, kind: str, taken: str | None) -> None:
    """Raise `NMBenchError` unless `name` can be registered, a module and part of a package's name, and is free."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > LONGEST:
        raise NMBenchError(
            f"plugin name {name!r} is not legal: at most {LONGEST} lower-case letters and digits, a letter first, "
            f"words joined by single hyphens, for example 'acme' or 'my-method'."
        )
    if keyword.iskeyword(class_of(name)):
        raise NMBenchError(f"plugin name {name!r} is not legal: {class_of(name)} means something in Python.")
    if taken is not None:
        raise NMBenchError(f"{KINDS[kind].registers} {name!r} is already provided by {taken}; choose another name.")


def contents(name: str, kind: str) -> Iterator[tuple[str, str]]:
    """Where each file goes, and its text."""
    module = f"nmbench_{name.replace('-', '_')}"
    this = KINDS[kind]
    values = {"name": name, "module": module, "class": class_of(name), "kind": this.word, "pin": pin()}
    values |= {"options": this.options, "run": this.run.replace("NAME", name)}
    sources = {f"{kind}.py": f"src/{module}/__init__.py", **FILES_OF[this.registers], **FILES}
    for source, target in sources.items():
        text = (importlib.resources.files(TEMPLATES) / f"{source}.in").read_text(encoding="utf-8")
        yield target, re.sub(r"%\{(\w+)\}", lambda match: values[match[1]], text)


def class_of(name: str) -> str:
    """The class of a plugin: my-method -> MyMethod."""
    return "".join(word.capitalize() for word in name.split("-"))


def pin() -> str:
    """Which releases of nmbench a new plugin asks for: this one and later ones that keep its promise."""
    import importlib.metadata  # slow, and the command line reads this module for the names of the kinds

    major, minor, *_ = importlib.metadata.version("nmbench").split(".")
    return f"nmbench>={major}.{minor},<{int(major) + 1}"
