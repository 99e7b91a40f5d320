"""The public names, and the rule that the built-in plugins, like all others, use no private ones.

Public is a name in the `__all__` of a package. A module inside a package is private, but for those of `MODULES`.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import nmbench
import nmbench_plugins
from nmbench.plugins.scaffold import KINDS, contents

PLUGINS = Path(nmbench_plugins.__file__).parent
SOURCES = {str(path.relative_to(PLUGINS)): path.read_text(encoding="utf-8") for path in PLUGINS.rglob("*.py")}
MODULES = {"nmbench.run", "nmbench.testing.models", "nmbench.testing.planted", "nmbench.testing.strategies"}
OF_TUPLES = ("_asdict", "_fields", "_replace")  # public names of every named tuple
TEMPLATES = {
    f"new-plugin {kind} {name}": text for kind in KINDS for name, text in contents("acme", kind) if name.endswith(".py")
}
EVERYBODY = {**SOURCES, **TEMPLATES}


def modules():
    """Every module of nmbench by name, but the Triton program, which needs Triton."""
    found = ["nmbench", *(info.name for info in pkgutil.walk_packages(nmbench.__path__, "nmbench."))]
    return [name for name in found if not name.endswith(".program")]


def public() -> dict[str, set[str]]:
    """The public names of every public module."""
    found = {name: importlib.import_module(name) for name in modules()}
    return {name: set(module.__all__) for name, module in found.items() if "__all__" in vars(module)}


PUBLIC = public()


@functools.cache
def nodes(source: str) -> tuple[ast.AST, ...]:
    """The nodes of a source that name something: imports, attributes and definitions."""
    kinds = (ast.Import, ast.ImportFrom, ast.Attribute, ast.FunctionDef, ast.ClassDef)
    return tuple(node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))


def used(source: str) -> list[tuple[str, str]]:
    """Everything of nmbench that a source file names: (module, name)."""
    found = []
    for node in nodes(source):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nmbench":
            found += [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "nmbench"]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nmbench":
            found.append(("nmbench", node.attr))
    return found


@pytest.mark.parametrize("name", EVERYBODY)
def test_plugins_use_public_names_only(name):
    """A built-in plugin, and a new one, imports and names nothing of nmbench that is not public."""
    private = [(module, item) for module, item in used(EVERYBODY[name]) if item and item not in PUBLIC.get(module, ())]
    assert private == []
    assert [module for module, item in used(EVERYBODY[name]) if not item and module != "nmbench"] == []


@pytest.mark.parametrize("name", SOURCES)
def test_plugins_touch_no_private_attribute(name):
    """A built-in plugin reads no attribute with a leading underscore that is not its own."""
    for node in nodes(SOURCES[name]):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            mine = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            assert mine or node.attr in (*defined(), *OF_TUPLES), (name, node.lineno, node.attr)


@functools.cache
def defined() -> set[str]:
    """Return the names of all functions and classes of the built-in plugins."""
    found = [node for source in SOURCES.values() for node in nodes(source)]
    return {node.name for node in found if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("name", SOURCES)
def test_plugins_do_not_import_each_other(name):
    """A built-in plugin imports nothing of another one."""
    top = name.split("/")[0].removesuffix(".py")
    for node in nodes(SOURCES[name]):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in names:
            if module.split(".")[0] == "nmbench_plugins":
                assert module.split(".")[1] == top, (name, module)


def test_the_test_can_fail():
    """Private names are found, however they are spelt."""
    bad = "import nmbench\nfrom nmbench.models.bundle import Bundle\nnmbench.registry\nimport nmbench.data\n"
    assert used(bad) == [
        ("nmbench", ""),
        ("nmbench.models.bundle", "Bundle"),
        ("nmbench.data", ""),
        ("nmbench", "registry"),
    ]
    assert "nmbench.models.bundle" not in PUBLIC
    assert "registry" not in PUBLIC["nmbench"]


def test_modules_inside_packages_are_private():
    """Only packages list public names, and the few modules that users import by name."""
    packages = {info.name for info in pkgutil.walk_packages(nmbench.__path__, "nmbench.") if info.ispkg}
    assert set(PUBLIC) - packages - {"nmbench"} == MODULES


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_there_and_documented(module):
    """Every public name exists, and every public class and function has a docstring."""
    home = importlib.import_module(module)
    for name in PUBLIC[module]:
        value = getattr(home, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert (value.__doc__ or "").strip(), f"{module}.{name}"
            assert not (value.__doc__ or "").startswith(f"{name}("), f"{module}.{name}"
