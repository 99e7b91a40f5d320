"""The order of layers: an import goes down, never up, and two layers of one height do not import each other.

Lazy imports and imports for annotations are counted, but for those of `CONTRACTS`, where a method or a source names
what it is handed.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

import nmbench

ROOT = Path(nmbench.__file__).parent
LAYERS = [
    {"errors"},
    {"pattern", "options"},
    {"runtime"},
    {"plain_data"},
    {"spec", "comparison"},
    {"methods", "sources"},
    {"data"},
    {"plugins"},
    {"models"},
    {"calibration", "evaluation"},
    {"verification"},
    {"results"},
    {"experiment"},
    {"pruning"},
    {"workers"},
    {"run"},
    {"testing", "artifacts", "speed"},
    {"cli"},
]
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}
CONTRACTS = {
    ("methods", "pruning"),  # LearnTask, BlockTask, WeightTask
    ("sources", "evaluation"),  # Subject
    ("sources", "models"),  # Bundle
    ("sources", "results"),  # Results
    ("plugins", "experiment"),  # Estimate
}


def part_of(module: str) -> str:
    """The first name below `nmbench`: a layer."""
    return module.removeprefix("nmbench").lstrip(".").split(".")[0]


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """All statements, nested ones as well, without a look at the expressions, which import nothing."""
    for node in body:
        yield node
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            yield from statements(getattr(node, name, []))


@functools.cache
def imports(source: str) -> list[tuple[str, bool]]:
    """Every import of `nmbench` in a source: the module, and whether only annotations use the import."""
    found = list(statements(ast.parse(source).body))
    checks = [n for n in found if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    typing_only = {id(inner) for check in checks for inner in statements([check])}
    modules = []
    for node in found:
        names = []
        if isinstance(node, ast.ImportFrom) and not node.level and node.module == "nmbench":
            names = [f"nmbench.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        modules += [(name, id(node) in typing_only) for name in names if name.split(".")[0] == "nmbench"]
    return modules


def upward(path: str, source: str) -> list[str]:
    """The imports of the module at `path`, relative to the package, that do not go down."""
    own = part_of(path.removesuffix(".py").replace("/", "."))
    found = []
    for module, typing_only in imports(source):
        other = part_of(module)
        if own != other and HEIGHT[other] >= HEIGHT[own] and not (typing_only and (own, other) in CONTRACTS):
            found.append(f"{path} imports {module}")
    return found


@pytest.mark.parametrize("path", sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py")))
def test_imports_go_down(path):
    """A module imports layers below its own, and modules of its own layer."""
    if path != "__init__.py":  # names every public name
        assert upward(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_every_entry_has_a_layer():
    """Every file and folder of the package stands in the order of layers."""
    entries = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert entries - {"__init__", "__main__"} == set(HEIGHT)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/bundle.py", "from nmbench.results.records import Record"),
        ("pattern.py", "def f():\n    from nmbench.options import read"),
        ("evaluation/losses.py", "import nmbench.calibration.walk"),
        ("methods.py", "from nmbench.pruning.learning import LearnTask"),
        ("models/bundle.py", "if TYPE_CHECKING:\n    from nmbench.run import run"),
    ],
)
def test_an_import_that_goes_up_is_found(path, source):
    """An import upwards is found, be it lazy or for annotations only; a contract may be named in annotations only."""
    assert len(upward(path, source)) == 1


def test_no_import_circles():
    """The modules of the package import each other without a circle, lazy imports and annotations counted."""
    found = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
        if not name.endswith("__init__"):
            own = part_of(name)
            found[name] = {
                module
                for module, typing_only in imports(path.read_text(encoding="utf-8"))
                if not (typing_only and (own, part_of(module)) in CONTRACTS)
            }
    left = {name: modules & set(found) for name, modules in found.items()}
    while ready := [name for name, modules in left.items() if not modules & set(left)]:
        for name in ready:
            del left[name]
    assert left == {}


def test_results_need_no_model():
    """The package `results` imports no layer that needs a model, so that `nmbench report` loads no transformers."""
    for path in (ROOT / "results").glob("*.py"):
        found = imports(path.read_text(encoding="utf-8"))
        needed = {part_of(module) for module, typing_only in found if not typing_only}
        assert not needed & {"models", "calibration", "evaluation"}, path
