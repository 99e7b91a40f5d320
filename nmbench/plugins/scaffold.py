"""`nmbench new-plugin`: writing a plugin package that builds, installs and passes its own tests.

The files come from `nmbench/plugins/templates`. Placeholders such as `%{name}` are replaced.
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
FILES_OF = {  # registered class -> template and target of the files that only such a package has
    "method": {"README.md": "README.md", "test_conformance.py": "tests/test_conformance.py"},
    "metric": {"metric_README.md": "README.md", "test_metric.py": "tests/test_metric.py"},
}


@dataclass(frozen=True)
class Kind:
    """The properties of one kind of package; NAME stands for the name of the plugin.

    `word`: the name of the kind in texts; `registers`: method or metric; `options`: the options in its tests; `run`:
    the flags of a comparison with another method; `show`: the command that shows the registered class.
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
    "repair": Kind("repair", run="--method NAME --method wanda --set NAME.init=magnitude,wanda"),
    "learner": Kind(
        "mask learner", options="steps=50, checkpoint_every=15", run="--method NAME --method wanda --set NAME.steps=50"
    ),
    "metric": Kind("metric", "metric", run="--method wanda --metric NAME:demo@256", show="nmbench plugins"),
}


def new_plugin(name: str, kind: str, parent: Path, taken: str | None = None) -> list[Path]:
    """Write the package `nmbench-NAME` into a new folder of that name in `parent`; return its files.

    `taken`: the plugin that already has a method or metric of this name. Raises `NMBenchError` for an illegal or taken
    name, and for an existing folder, which stays unchanged.
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
    """Raise `NMBenchError` unless `name` is legal in a registry, a module and a package, and not taken."""
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
    """Yield path (within the package) and text of every file."""
    module = f"nmbench_{name.replace('-', '_')}"
    properties = KINDS[kind]
    values = {"name": name, "module": module, "class": class_of(name), "kind": properties.word, "pin": pin()}
    values |= {"options": properties.options, "run": properties.run.replace("NAME", name)}
    sources = {f"{kind}.py": f"src/{module}/__init__.py", **FILES_OF[properties.registers], **FILES}
    for source, target in sources.items():
        text = (importlib.resources.files(TEMPLATES) / f"{source}.in").read_text(encoding="utf-8")
        yield target, re.sub(r"%\{(\w+)\}", lambda match: values[match[1]], text)


def class_of(name: str) -> str:
    """Return the class name of a plugin: my-method -> MyMethod."""
    return "".join(word.capitalize() for word in name.split("-"))


def pin() -> str:
    """Return the requirement of a new plugin: this release of nmbench or a later one of the same major version."""
    import importlib.metadata  # slow, and the command line imports this module for KINDS

    major, minor, *_ = importlib.metadata.version("nmbench").split(".")
    return f"nmbench>={major}.{minor},<{int(major) + 1}"
