"""Plugin packages for the tests of the loader: good ones, and one broken in every way that we know of.

Every package is written to disk as pip would leave it: a module and a dist-info folder with entry points.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

from nmbench.plugins.checking import BASES

WORK = {base.__name__: base.work_method for bases in BASES.values() for base in bases}

VERSION = "0.7"
BASE = {
    "baselines": "Scorer",
    "mask_learners": "MaskLearner",
    "repairs": "LayerRepair",
    "models": "ModelSource",
    "datasets": "Dataset",
    "metrics": "Metric",
    "reporters": "Reporter",
}
SEEN = "@nmbench.hookimpl\ndef nmbench_method_finished(record):\n    record.append(__name__)\n"


def announcing(**names: tuple[str, ...]) -> str:
    """The source of a plugin that registers `names` by kind, and signs every record it is shown."""
    parts = ["import nmbench", SEEN]
    for kind, listed in names.items():
        parts += [f"class Of_{kind}(nmbench.{BASE[kind]}): pass", f"Of_{kind}.{WORK[BASE[kind]]} = print"]
        parts += ["@nmbench.hookimpl"]
        parts += [f"def nmbench_register_{kind}(register):", *(f"    register({n!r}, Of_{kind})" for n in listed)]
    return "\n".join(parts) + "\n"


GOOD: dict[str, dict[str, tuple[str, ...]]] = {
    "acme": {"baselines": ("acme",)},
    "alps": {"baselines": ("alps", "ria"), "datasets": ("acme",)},  # names are unique within a kind only
    "learner": {"mask_learners": ("learner",), "reporters": ("html",)},
    "rival": {"models": ("tiny",), "baselines": ("fine",), "mask_learners": ("ria",)},  # clashes with alps half-way
    "twin": {"mask_learners": ("acme",), "metrics": ("loss",)},  # clashes with acme
    "zz": {"models": ("zz",), "metrics": ("kl",)},
}


@dataclass(frozen=True)
class Broken:
    """What is wrong with a plugin, the stage and exception it must be reported with, and words of the message."""

    stage: str
    error: str
    words: tuple[str, ...]
    source: str
    attribute: str = ""


LEFT = announcing(baselines=("left",))  # what a broken plugin must not leave behind
HOOK = LEFT + "@nmbench.hookimpl\n"
BAD = {
    "missing": Broken("import", "ModuleNotFoundError", ("no_such_module",), LEFT + "import no_such_module\n"),
    "exits": Broken("import", "SystemExit", ("3",), LEFT + "raise SystemExit(3)\n"),
    "syntax": Broken("import", "SyntaxError", ("invalid syntax",), LEFT + "def 7\n"),
    "attribute": Broken("import", "AttributeError", ("nothing",), LEFT, ":nothing"),
    "constructor": Broken(
        "import",
        "RuntimeError",
        ("no device",),
        "class P:\n  def __init__(self): raise RuntimeError('no device')",
        ":P",
    ),
    "misspelt": Broken(
        "signature",
        "PluginError",
        ("'nmbench_register_baselins' does not exist", "Did you mean 'nmbench_register_baselines'?"),
        HOOK + "def nmbench_register_baselins(register): pass\n",
    ),
    "unmarked": Broken(
        "signature",
        "PluginError",
        ("nmbench_run_started is not marked", "@nmbench.hookimpl"),
        LEFT + "def nmbench_run_started(spec): pass\n",
    ),
    "default": Broken(
        "signature",
        "PluginError",
        ("'event' of hook nmbench_progress", "no default"),
        HOOK + "def nmbench_progress(event=None): pass\n",
    ),
    "keyword": Broken(
        "signature",
        "PluginError",
        ("'event' of hook nmbench_progress", "not keyword-only"),
        HOOK + "def nmbench_progress(*, event): pass\n",
    ),
    "unknown": Broken(
        "signature",
        "PluginError",
        ("nmbench_progress has no parameter 'step'", "takes event"),
        HOOK + "def nmbench_progress(event, step): pass\n",
    ),
    "starred": Broken(
        "signature",
        "PluginError",
        ("nmbench_progress has no parameter 'args'",),
        HOOK + "def nmbench_progress(*args): pass\n",
    ),
    "silent": Broken(
        "signature", "PluginError", ("implements no hook", "nmbench_register_models"), "import nmbench\nx = 1\n"
    ),
    **{
        kind: Broken(
            "signature",
            "PluginError",
            ("nmbench_progress uses", kind, "cannot wrap"),
            f"{LEFT}@nmbench.hookimpl({kind}=True)\ndef nmbench_progress(event): yield\n",
        )
        for kind in ("wrapper", "hookwrapper", "tryfirst", "trylast")
    },
    "raises": Broken(
        "register", "ZeroDivisionError", ("division",), HOOK + "def nmbench_register_models(register): 1 / 0\n"
    ),
    "quits": Broken(
        "register", "SystemExit", ("4",), HOOK + "def nmbench_register_models(register): raise SystemExit(4)\n"
    ),
    "taken": Broken(
        "register",
        "NMBenchError",
        ("method 'acme' of taken 0.7", "already provided by acme 0.7"),
        LEFT.replace("register('left'", "register('left', Of_baselines); register('acme'"),
    ),
    "capitals": Broken(
        "register", "NMBenchError", ("'Left'", "lower-case"), LEFT.replace("register('left'", "register('Left'")
    ),
    "kind": Broken(
        "register",
        "PluginError",
        ("'wrong'", "derived from nmbench.Dataset"),
        HOOK + "def nmbench_register_datasets(register): register('wrong', Of_baselines)\n",
    ),
    "instance": Broken(
        "register",
        "PluginError",
        ("'wrong'", "derived from nmbench.MaskLearner"),
        HOOK + "def nmbench_register_mask_learners(register): register('wrong', nmbench.MaskLearner())\n",
    ),
    "learner_as_baseline": Broken(
        "register",
        "PluginError",
        ("'left'", "derived from nmbench.Scorer or nmbench.Solver"),
        LEFT.replace("nmbench.Scorer", "nmbench.MaskLearner"),
    ),
    "required": Broken(
        "register",
        "PluginError",
        ("option 'steps' of 'left' needs a default",),
        "from dataclasses import dataclass\n"
        + LEFT.replace("class Of", "@dataclass(frozen=True)\nclass Of").replace("): pass", "): steps: int"),
    ),
    **{
        problem: Broken(
            "register",
            "PluginError",
            words,
            "from dataclasses import dataclass\n"
            + announcing(**{kind: ("left",)})
            .replace("class Of", "@dataclass(frozen=True)\nclass Of")
            .replace("): pass", f"): {option}"),
        )
        for problem, kind, option, words in (
            ("reserved", "baselines", "preset: str = 'x'", ("option 'preset' of 'left'", "rename it")),
            ("hides_method", "baselines", "score: int = 3", ("option 'score' of 'left'", "reserves")),
            ("hides_needs", "baselines", "needs: int = 3", ("option 'needs' of 'left'", "reserves")),
            ("hides_learn", "mask_learners", "learn: bool = True", ("option 'learn' of 'left'", "reserves")),
            ("retyped", "mask_learners", "init: int = 3", ("option 'init' of 'left'", "has another type")),
            ("unreadable", "baselines", "names: list = None", ("option 'names' of 'left'", "int, float, bool, str")),
            ("unresolved", "baselines", "steps: 'Integer' = 3", ("types of the options of 'left'", "Integer")),
        )
    },
    **{
        f"workless_{kind}": Broken(
            "register",
            "PluginError",
            (f"class Of_{kind} of 'left' has no method {WORK[base]!r}, which every nmbench.{base} needs", question),
            announcing(**{kind: ("left",)}).replace(f"Of_{kind}.{WORK[base]} =", f"Of_{kind}.{called} ="),
        )
        for kind, base, called, question in (
            ("baselines", "Scorer", "scores", "Is it what you call 'scores'?"),
            ("mask_learners", "MaskLearner", "learns", "Is it what you call 'learns'?"),
            ("models", "ModelSource", "loader", "Is it what you call 'loader'?"),
            ("datasets", "Dataset", "text", "Is it what you call 'text'?"),
            ("metrics", "Metric", "measured", "Is it what you call 'measured'?"),
            ("reporters", "Reporter", "xyz", "nmbench.Reporter needs."),
        )
    },
    "undecorated": Broken(
        "register",
        "PluginError",
        ("'steps'", "@dataclass(frozen=True)"),
        LEFT.replace("): pass", "): steps: int = nmbench.option(3, 'steps')"),
    ),
}


def install(modules: Path, infos: Path, package: str, source: str, attribute: str = "", metadata: bool = True) -> None:
    """Write a package with a module `zoo_PACKAGE` in `modules`, and its dist-info, with the entry point
    `PACKAGE_entry`, in `infos`.
    """
    (modules / f"zoo_{package}.py").write_text(source, encoding="utf-8")
    info = infos / f"{package}-{VERSION}.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_text(f"[nmbench]\n{package}_entry = zoo_{package}{attribute}\n")
    if metadata:
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {VERSION}\n")
    importlib.invalidate_caches()


def install_all(modules: Path, infos: Path) -> None:
    for package, names in GOOD.items():
        install(modules, infos, package, announcing(**names))
    for package, broken in BAD.items():
        install(modules, infos, package, broken.source, broken.attribute)


def entry_points(folder: Path) -> dict[str, importlib.metadata.EntryPoint]:
    """The entry point of every package in a folder, by package."""
    found = importlib.metadata.distributions(path=[str(folder)])
    points = [point for dist in found for point in dist.entry_points if point.group == "nmbench"]
    return {point.name.removesuffix("_entry"): point for point in points}
