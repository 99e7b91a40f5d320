"""Laws of the plugin loader: a broken plugin is named, registers nothing and stops no other plugin."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
import types
from itertools import pairwise

import pluggy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

import nmbench as public
import nmbench.plugins.loading as plugin_module
from nmbench.errors import NMBenchError, PluginError, UnknownName
from nmbench.options import describe
from nmbench.plugins import hookspecs
from nmbench.plugins.checking import known_hooks
from nmbench.plugins.loading import (
    DISABLE,
    TRACE,
    Plugins,
    import_file,
    installed,
    load_plugin,
    load_plugins,
    manager_with_specs,
)
from reference import zoo

KINDS = {  # announcing hooks without their prefix, and the registry that each must fill
    "baselines": "methods",
    "mask_learners": "methods",
    "repairs": "methods",
    "models": "models",
    "datasets": "datasets",
    "metrics": "metrics",
    "reporters": "reporters",
}
OBSERVING = {
    "nmbench_run_started": "spec",
    "nmbench_progress": "event",
    "nmbench_method_finished": "record",
    "nmbench_run_finished": "records",
}
HEAVY = ("rich", "torch", "transformers", "pandas", "datasets", "numpy", "safetensors", "tokenizers")
NAMES = [*zoo.GOOD, *zoo.BAD]


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    """The entry points of all packages of the zoo, by package; they can be imported, and are not found unasked."""
    modules, infos = tmp_path_factory.mktemp("modules"), tmp_path_factory.mktemp("infos")
    zoo.install_all(modules, infos)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(modules))
        yield zoo.entry_points(infos)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No variable of the environment decides which plugins are loaded."""
    monkeypatch.delenv(DISABLE, raising=False)
    monkeypatch.delenv(TRACE, raising=False)


def load(points, *packages):
    return load_plugins(entry_points=[points[package] for package in packages])


def held(plugins: Plugins) -> dict[str, dict[str, str]]:
    """Return the content of all registries: registry -> name -> origin."""
    registries = {kind: getattr(plugins.registries, kind) for kind in KINDS.values()}
    return {kind: {entry.name: entry.origin for entry in registry} for kind, registry in registries.items()}


def shown(plugins: Plugins) -> list[tuple]:
    return [(info.name, info.hooks, info.registered, str(info.failure)) for info in plugins.infos]


def origin(package: str) -> str:
    return f"{package} {zoo.VERSION} [{package}_entry]"


def expected(packages) -> dict[str, dict[str, str]]:
    """Return the content of the registries when exactly these good packages are loaded."""
    content = {kind: {} for kind in KINDS.values()}
    for package in packages:
        for kind, names in zoo.GOOD[package].items():
            content[KINDS[kind]].update(dict.fromkeys(names, origin(package)))
    return content


def observers(plugins: Plugins) -> list[str]:
    """The packages whose observer is called."""
    seen = []
    plugins.announce("nmbench_method_finished", record=seen)
    return [module.removeprefix("zoo_") for module in seen]


# Broken plugins


@pytest.mark.parametrize("package", zoo.BAD)
def test_broken_plugin_is_named_and_leaves_nothing(points, package):
    """A broken plugin is listed with package, version, stage and original exception; all others work as without it."""
    broken = zoo.BAD[package]
    plugins = load(points, "acme", package, "zz")
    (info,) = plugins.failures
    assert (info.name, info.package, info.version) == (origin(package), package, zoo.VERSION)
    assert info.entry == f"{package}_entry"
    assert (info.failure.stage, type(info.failure.error).__name__) == (broken.stage, broken.error)
    text = str(info.failure)
    assert text.startswith(f"{broken.stage}: ") and "\n" not in text
    assert [words for words in broken.words if words not in text] == []
    assert (info.hooks, info.registered) == ((), ())
    assert held(plugins) == expected(["acme", "zz"])
    assert observers(plugins) == ["acme", "zz"]
    assert {name for name, _ in plugins.manager.list_name_plugin()} == {origin("acme"), origin("zz")}


def test_whole_zoo_at_once(points):
    """However many plugins are broken, each is reported, and the good ones work."""
    plugins = load(points, *zoo.BAD, "acme", "zz")
    assert {info.package for info in plugins.failures} == set(zoo.BAD)
    assert held(plugins) == expected(["acme", "zz"])


def test_unknown_method_names_failed_plugins(points):
    """The error for an unknown method names the nearest one, and every failed plugin with its stage."""
    plugins = load(points, "acme", "raises")
    with pytest.raises(UnknownName, match="Did you mean 'acme'") as caught:
        plugins.lookup(plugins.registries.methods, "acmee")
    assert f"plugin {origin('raises')} failed at register: ZeroDivisionError" in str(caught.value)
    assert plugins.lookup(plugins.registries.methods, "acme").__name__ == "Of_baselines"


def test_plugin_under_two_names(points):
    """A plugin that two entry points name is loaded once; the second is a failure that names the first."""
    again = type(points["acme"])("other", "zoo_acme", "nmbench")
    plugins = load_plugins(entry_points=[points["acme"], again])
    (info,) = [info for info in plugins.infos if info.failure]
    assert info.failure.stage == "signature" and "already loaded as" in str(info.failure)
    assert sorted(held(plugins)["methods"]) == observers(plugins) == ["acme"]


def test_name_taken_twice_keeps_the_first(points):
    """A second plugin of the very same package and entry is refused, and takes nothing of the first away."""
    plugins = load(points, "acme")
    assert load_plugin(installed(points["acme"]), plugins).failure
    assert held(plugins) == expected(["acme"]) and observers(plugins) == ["acme"]


def test_interrupt_is_no_failure(points, tmp_path):
    """Ctrl-C while a plugin loads ends the program; it is not taken for a broken plugin."""
    file = tmp_path / "slow.py"
    file.write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_plugins([str(file)], entry_points=[])


# Where plugins come from


def test_installed_packages_are_found(tmp_path, monkeypatch):
    """Packages on sys.path with an entry point of the group nmbench are found without being named."""
    zoo.install(tmp_path, tmp_path, "found", zoo.announcing(datasets=("found",)))
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = load_plugins(disabled=["nmbench"])
    (info,) = [info for info in plugins.infos if info.package == "found"]
    assert (info.name, info.registered, info.failure) == (origin("found"), ("found",), None)
    assert info.hooks == ("nmbench_method_finished", "nmbench_register_datasets")
    assert "found" in plugins.registries.datasets
    assert list(plugins.registries.methods) == []


def test_damaged_installation_is_loaded_too(tmp_path, monkeypatch, points):
    """A package without metadata has no name and no version, and is a plugin all the same."""
    zoo.install(tmp_path, tmp_path, "nameless", zoo.announcing(models=("nameless",)), metadata=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    damaged = zoo.entry_points(tmp_path)["nameless"]
    plugins = load_plugins(entry_points=[points["acme"], damaged])
    assert [info.name for info in plugins.infos] == [origin("acme"), "unknown package ? [nameless_entry]"]
    assert not plugins.failures


def test_single_file(tmp_path, points):
    """A file given by its path is a plugin after the installed ones, named by that path."""
    file = tmp_path / "mine.py"
    file.write_text(zoo.announcing(baselines=("mine",)))
    plugins = load_plugins([str(file)], entry_points=[points["zz"]])
    assert [info.name for info in plugins.infos] == [origin("zz"), f"file {file}"]
    assert held(plugins)["methods"] == {"mine": f"file {file}"}


@pytest.mark.parametrize("name", ["missing.py", "text.txt", "folder.py", ""])
def test_file_that_is_no_plugin_file(tmp_path, name):
    """A file asked for that does not exist or is no Python file is an error that names it."""
    (tmp_path / "text.txt").write_text("")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(NMBenchError, match=r"plugin file .* does not exist or is no \.py file"):
        load_plugins([str(tmp_path / name)], entry_points=[])


def test_broken_file_leaves_no_module(tmp_path):
    """A file that fails while it is imported is a failure at import, and its module is forgotten."""
    file = tmp_path / "halfway.py"
    file.write_text("x = 1\nraise OSError('no such disk')")
    before = set(sys.modules)
    (info,) = load_plugins([str(file)], entry_points=[]).infos
    assert str(info.failure) == "import: OSError: no such disk"
    assert not [name for name in set(sys.modules) - before if "halfway" in name]


def test_file_given_twice(tmp_path, monkeypatch):
    """One file given twice, even spelt in two ways, is loaded once."""
    (tmp_path / "mine.py").write_text(zoo.announcing(baselines=("mine",)))
    monkeypatch.chdir(tmp_path)
    plugins = load_plugins(["mine.py", "mine.py", "./mine.py"], entry_points=[])
    assert len(plugins.infos) == 1 and not plugins.failures and "mine" in plugins.registries.methods


def test_files_of_one_name_stay_apart(tmp_path):
    """Two files of one name in two folders each resolve the annotations of their own methods."""
    source = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport nmbench\nNumber = {type}\n"
        "@dataclass(frozen=True)\nclass M(nmbench.Scorer):\n    x: Number = nmbench.option({value}, 'x')\n"
        "    def score(self, weight, stats): return weight\n"
        "@nmbench.hookimpl\ndef nmbench_register_baselines(register): register('of-{type}', M)\n"
    )
    files = []
    for kind, value in (("int", 1), ("float", 2.0)):
        (tmp_path / kind).mkdir()
        files.append(tmp_path / kind / "mine.py")
        files[-1].write_text(source.format(type=kind, value=value))
    plugins = load_plugins([str(file) for file in files], entry_points=[])
    types_of = {entry.name: describe(entry.obj)[0].type for entry in plugins.registries.methods}
    assert types_of == {"of-int": "int", "of-float": "float"}


@pytest.mark.parametrize("by", ["acme", "acme_entry", "variable"])
def test_disabled_plugin_is_listed_and_not_imported(points, by, monkeypatch):
    """A plugin disabled by package or entry, in the call or in the environment, is listed and never imported."""
    monkeypatch.setenv(DISABLE, "missing , acme" if by == "variable" else "missing")
    monkeypatch.delitem(sys.modules, "zoo_acme", raising=False)
    plugins = load_plugins(disabled=[by], entry_points=[points[p] for p in ("acme", "missing", "zz", "alps")])
    assert [(info.package, info.disabled) for info in plugins.infos] == [
        *(("acme", True), ("alps", False), ("missing", True), ("zz", False)),
    ]
    assert not plugins.failures and "zoo_acme" not in sys.modules
    assert held(plugins) == expected(["zz", "alps"])


def test_object_and_class_plugins(tmp_path):
    """An entry point may name a module, a class, which is instantiated, or an object."""
    source = zoo.announcing(baselines=("mine",)) + (
        "class P:\n    @nmbench.hookimpl\n    def nmbench_register_models(self, register):\n"
        "        register('m', type('M', (nmbench.ModelSource,), {'load': print}))\n"
        "p = P()\n"
    )
    zoo.install(tmp_path, tmp_path, "klass", source, ":P")
    zoo.install(tmp_path, tmp_path, "object", source, ":p")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        for package in ("klass", "object"):
            (info,) = load_plugins(entry_points=[zoo.entry_points(tmp_path)[package]]).infos
            assert (info.hooks, info.registered, info.failure) == (("nmbench_register_models",), ("m",), None)


# Order


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_order_of_discovery_does_not_matter(points, data):
    """In whatever order packages are found, clashing and broken ones among them, the outcome is the same, sorted."""
    chosen = data.draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=8))
    plugins, again = load(points, *chosen), load(points, *data.draw(st.permutations(chosen)))
    assert [info.package for info in plugins.infos] == sorted(chosen)
    assert held(plugins) == held(again)
    assert shown(plugins) == shown(again)


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(["acme", "alps", "learner", "zz", "misspelt", "raises", "missing"]))
def test_order_of_loading_does_not_matter(points, order):
    """Plugins that do not clash give the same registries in whatever order they are loaded, broken ones among them."""
    plugins = load_plugins(entry_points=[])
    for package in order:
        load_plugin(installed(points[package]), plugins)
    assert held(plugins) == expected(["acme", "alps", "learner", "zz"])


class Loading(RuleBasedStateMachine):
    """Good, clashing and broken plugins are loaded and removed; `model` holds those that should be registered."""

    entry_points: dict

    def __init__(self):
        super().__init__()
        self.plugins = load_plugins(entry_points=[])
        self.model: list[str] = []

    @rule(package=st.sampled_from(list(zoo.GOOD)))
    def load_good(self, package):
        clashes = {"acme": "twin", "twin": "acme", "alps": "rival", "rival": "alps"}
        refused = package in self.model or clashes.get(package) in self.model
        info = load_plugin(installed(self.entry_points[package]), self.plugins)
        assert bool(info.failure) == refused
        self.model += [] if refused else [package]

    @rule(package=st.sampled_from([package for package in zoo.BAD if package != "taken"]))
    def load_broken(self, package):
        assert load_plugin(installed(self.entry_points[package]), self.plugins).failure.stage == zoo.BAD[package].stage

    @rule(package=st.sampled_from(NAMES))
    def remove(self, package):
        self.plugins.remove(origin(package))
        self.model = [other for other in self.model if other != package]

    @invariant()
    def holds_what_the_model_holds(self):
        assert held(self.plugins) == expected(self.model)
        assert observers(self.plugins) == self.model


def test_registries_equal_a_model(points):
    """After any sequence of loading good, clashing and broken plugins and removing some, registries equal a model."""

    class Here(Loading):
        entry_points = points

    run_state_machine_as_test(Here, settings=settings(max_examples=30, stateful_step_count=15, deadline=None))


# Hooks


def test_every_hook_is_documented_and_tested():
    """Every hook says in its docstring when it is called, and is in one of the two tables these tests run over."""
    assert set(known_hooks()) == {*(f"nmbench_register_{kind}" for kind in KINDS), *OBSERVING}
    for name, spec in known_hooks().items():
        doc = spec.__doc__ or ""
        assert doc.startswith(("When ", "Once, when ", "Often, while ", "After ")), name
        options = spec.nmbench_spec
        assert options["historic"] == name.startswith("nmbench_register_") and not options["firstresult"], name


def test_hook_under_another_function_name(tmp_path):
    """A function of any name is an implementation of the hook that its `specname` names, and listed as that."""
    file = tmp_path / "mine.py"
    source = zoo.announcing(models=("mine",)).replace("def nmbench_register_models", "def announce_models")
    marked = "@nmbench.hookimpl(specname='nmbench_register_models')\ndef announce"
    file.write_text(source.replace("@nmbench.hookimpl\ndef announce", marked))
    (info,) = load_plugins([str(file)], entry_points=[]).infos
    assert (sorted(info.hooks), info.registered) == (["nmbench_method_finished", "nmbench_register_models"], ("mine",))


@pytest.mark.parametrize("kind", KINDS)
def test_announcing_hook_fills_its_registry(tmp_path, kind):
    """A class registered through an announcing hook is found under its name in that kind's registry only."""
    file = tmp_path / "mine.py"
    file.write_text(zoo.announcing(**{kind: ("mine", "also-mine")}))
    plugins = load_plugins([str(file)], entry_points=[])
    assert plugins.infos[0].registered == ("mine", "also-mine")
    names = dict.fromkeys(("also-mine", "mine"), f"file {file}")
    assert held(plugins) == {registry: names if registry == KINDS[kind] else {} for registry in KINDS.values()}


def test_registry_belongs_to_one_kind():
    """Baselines, mask learners and repairs share one registry; every other hook has its own."""
    by_hook = load_plugins(entry_points=[]).registries.by_hook()
    assert list(by_hook) == [f"nmbench_register_{kind}" for kind in KINDS]
    assert len({id(registry) for registry in by_hook.values()}) == len(by_hook) - 2


def watching(hook: str, action, with_argument: bool = True):
    """Return an observer of one hook that calls `action` with the hook's argument."""
    space = {"hookimpl": hookspecs.hookimpl, "action": action}
    taken = OBSERVING[hook] if with_argument else ""
    exec(f"class P:\n @hookimpl\n def {hook}(self{', ' + taken if taken else ''}): return action({taken})", space)
    return space["P"]()


@pytest.mark.parametrize("hook", OBSERVING)
def test_failing_observer_is_logged_once_and_stops_nobody(hook, caplog):
    """Each observer gets the argument of its hook; one that raises, or calls exit, is logged once, by name."""
    seen, plugins = [], load_plugins(entry_points=[])

    def leave(_):
        raise SystemExit(1)

    plugins.add_observer(watching(hook, lambda _: 1 / 0), "divider")
    plugins.add_observer(watching(hook, seen.append), "first")
    plugins.add_observer(watching(hook, leave), "leaver")
    plugins.add_observer(watching(hook, lambda: seen.append("nothing"), with_argument=False), "second")
    with caplog.at_level(logging.WARNING, "nmbench"):
        for thing in ("a", "b", "c"):
            given = dict.fromkeys(inspect.signature(getattr(hookspecs, hook)).parameters, thing)
            assert plugins.announce(hook, **given) is None
    assert seen == ["a", "nothing", "b", "nothing", "c", "nothing"]
    texts = [record.getMessage() for record in caplog.records]
    assert texts == [
        f"plugin divider failed in {hook}: ZeroDivisionError: division by zero",
        f"plugin leaver failed in {hook}: SystemExit: 1",
    ]


def test_interrupt_in_an_observer_is_not_swallowed():
    """Ctrl-C while an observer works still interrupts the run."""
    plugins = load_plugins(entry_points=[])

    def interrupted(_):
        raise KeyboardInterrupt

    plugins.add_observer(watching("nmbench_progress", interrupted), "slow")
    with pytest.raises(KeyboardInterrupt):
        plugins.announce("nmbench_progress", event=None)


def test_observers_are_called_in_loading_order(points):
    """Observers are called in the order in which their plugins are loaded."""
    assert observers(load(points, "zz", "learner", "alps")) == ["alps", "learner", "zz"]


# Late plugins


def module(source: str) -> types.ModuleType:
    made = types.ModuleType("late")
    exec(source, vars(made))
    return made


def test_late_plugin_gets_the_announcing_hooks(points):
    """An object added after loading registers what it announces, under its own name."""
    plugins = load(points, "acme")
    plugins.add_observer(module(zoo.announcing(mask_learners=("late",))), "latecomer")
    assert held(plugins)["methods"] == {"acme": origin("acme"), "late": "latecomer"}


@pytest.mark.parametrize("package", ["misspelt", "silent", "raises", "taken", "kind"])
def test_late_plugin_that_is_broken(points, package):
    """A late plugin that is broken raises what is wrong with it, and leaves nothing behind."""
    plugins = load(points, "acme")
    with pytest.raises((PluginError, NMBenchError, ZeroDivisionError)):
        plugins.add_observer(module(zoo.BAD[package].source), "latecomer")
    assert held(plugins) == expected(["acme"]) and observers(plugins) == ["acme"]


# Command line and imports


def test_command_line_lists_every_plugin(nmbench, tmp_path, monkeypatch):
    """`nmbench plugins` names good, disabled and failed plugins, and its exit status says whether one failed."""
    monkeypatch.setenv(DISABLE, "nmbench,off")
    (tmp_path / "good.py").write_text(zoo.announcing(baselines=("good",)))
    (tmp_path / "off.py").write_text("")
    (tmp_path / "bad.py").write_text(zoo.BAD["misspelt"].source)
    done = nmbench("plugins", "--plugin", "good.py", "--plugin", "off.py")
    assert done.exit_code == 0
    assert "file good.py: nmbench_method_finished, nmbench_register_baselines" in done.output
    assert "file off.py: disabled" in done.output
    failed = nmbench("plugins", "--plugin", "bad.py", "--plugin", "good.py")
    assert failed.exit_code == 1
    assert "file bad.py: FAILED at signature: hook 'nmbench_register_baselins' does not exist" in failed.output


def test_command_line_shows_options_of_a_plugin(nmbench, tmp_path, monkeypatch):
    """`nmbench methods NAME --plugin FILE` shows a method of that file with its options, kind and origin."""
    monkeypatch.setenv(DISABLE, "nmbench")
    (tmp_path / "good.py").write_text(zoo.announcing(mask_learners=("good",)))
    shown = nmbench("methods", "good", "--plugin", "good.py")
    assert shown.exit_code == 0, shown.output
    assert "good: mask learner of file good.py" in shown.output and "--set good.init=wanda" in shown.output
    missing = nmbench("methods", "goood", "--plugin", "good.py")
    assert missing.exit_code == 1 and "Error: unknown method 'goood'. Did you mean 'good'?" in missing.output


def test_trace_shows_hook_calls(points, monkeypatch, capsys):
    """With NMBENCH_TRACE set, hook calls are written to standard error."""
    monkeypatch.setenv(TRACE, "1")
    load(points, "zz")
    assert "nmbench_register_models" in capsys.readouterr().err


LIGHT = ["errors", "methods", "options", "pattern", "sources", "plugins", "experiment.progress", "cli"]
PUBLIC = "Dataset, MaskLearner, Metric, ModelSource, Reporter, Scorer, Solver, hookimpl, load_plugins, option"
CODES = {
    "package": "import nmbench",
    "core": "\n".join(f"import nmbench.{name}" for name in LIGHT),
    "public": f"from nmbench import {PUBLIC}",
}
HELPS = ([], ["run"], ["methods"], ["plugins"], ["report"], ["new-plugin"])


def fresh(code: str) -> subprocess.CompletedProcess:
    """Run code in a new interpreter in which no heavy package can be imported."""
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({HEAVY!r}))\n"
    return subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_core_imports_nothing_heavy(code):
    """The package, its command line and what plugin authors import need no torch, pandas or numpy."""
    done = fresh(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", HELPS, ids=" ".join)
def test_help_imports_nothing_heavy(command):
    """`nmbench --help` and the help of every command need no torch, pandas or numpy."""
    done = fresh(f"from nmbench.cli import main\nmain({[*command, '--help']!r}, prog_name='nmbench')")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: {' '.join(['nmbench', *command])} ")


def test_blocking_blocks():
    """The interpreter of the two tests above really cannot import what is heavy."""
    assert "ModuleNotFoundError" in fresh("import torch").stderr


def test_unknown_public_name():
    """A name that nmbench does not have is an AttributeError, and the public names are sorted and distinct."""
    with pytest.raises(AttributeError, match="no attribute 'Sorcerer'"):
        _ = public.Sorcerer
    assert all(a < b for a, b in pairwise(public.__all__)) and "hookimpl" in dir(public)


# What is deprecated


def test_deprecated_hooks_are_listed_and_warned_of(points, monkeypatch):
    """A plugin with a deprecated hook has the notice in the list and as a warning; it still works."""
    manager_of = plugin_module.manager_with_specs

    def with_deprecated_hook():
        manager = manager_of()
        manager.hook.nmbench_register_models.spec.opts["warn_on_impl"] = None
        manager.hook.nmbench_register_models.spec.warn_on_impl = DeprecationWarning("use something else")
        return manager

    monkeypatch.setattr(plugin_module, "manager_with_specs", with_deprecated_hook)
    with pytest.warns(DeprecationWarning, match="use something else"):
        plugins = load(points, "acme", "zz")
    assert [info.deprecations for info in plugins.infos] == [(), ("use something else",)]
    assert held(plugins) == expected(["acme", "zz"])


HOOKS_OF_ALL_FORMS = """
import nmbench

class Reports:
    @nmbench.hookimpl
    def nmbench_register_reporters(self, register):
        pass

@nmbench.hookimpl
def nmbench_register_metrics(register):
    pass

nmbench_register_reporters = Reports().nmbench_register_reporters
other, Plain = 3, Reports
"""


def test_hooks_of_a_module_are_those_of_pluggy(tmp_path):
    """Functions and bound methods of a module are hooks, and nothing else is, as pluggy itself finds."""
    (tmp_path / "forms.py").write_text(HOOKS_OF_ALL_FORMS)
    module, manager = import_file(tmp_path / "forms.py"), manager_with_specs()
    plain = pluggy.PluginManager(hookspecs.PROJECT)
    found = {name: manager.parse_hookimpl_opts(module, name) for name in dir(module)}
    assert found == {name: plain.parse_hookimpl_opts(module, name) for name in dir(module)}
    assert {name for name, options in found.items() if options} == {
        "nmbench_register_metrics",
        "nmbench_register_reporters",
    }
