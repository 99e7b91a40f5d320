"""Finding plugins and registering their classes, one plugin at a time: a broken plugin never stops the others.

A plugin is a module, class or object with functions marked `@nmbench.hookimpl`. An entry point of the group `nmbench`
names it, or it is a single file. Every failure keeps its plugin and its stage (import, signature, register), and the
names of a plugin that fails while it registers are removed again.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import pluggy

from nmbench.errors import NMBenchError, UnknownName
from nmbench.plugins import hookspecs
from nmbench.plugins.checking import check_object, hooks_of, refuse_second
from nmbench.plugins.registry import FILE, Registries, Registry
from nmbench.plugins.source_digest import DIGEST, digest_of

GROUP = "nmbench"
DISABLE = "NMBENCH_DISABLE_PLUGINS"
TRACE = "NMBENCH_TRACE"
logger = logging.getLogger("nmbench")


@dataclass(frozen=True)
class PluginFailure:
    """The stage at which a plugin failed, and the original exception `error`."""

    stage: str
    error: BaseException

    def __str__(self) -> str:
        if isinstance(self.error, NMBenchError):
            return f"{self.stage}: {self.error}"
        return f"{self.stage}: {type(self.error).__name__}: {self.error}"


@dataclass(frozen=True)
class PluginInfo:
    """One plugin as `nmbench plugins` shows it. `name` is `package version [entry]` or `file PATH`."""

    name: str
    package: str
    version: str
    entry: str
    hooks: tuple[str, ...] = ()
    registered: tuple[str, ...] = ()
    failure: PluginFailure | None = None
    disabled: bool = False
    deprecations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A plugin before its import, and the function that imports it."""

    info: PluginInfo
    load: Callable[[], Any]


@dataclass
class Plugins:
    """All plugins of one process: their registries, one `PluginInfo` each, and the observers among them."""

    manager: pluggy.PluginManager
    registries: Registries = field(default_factory=Registries)
    infos: list[PluginInfo] = field(default_factory=list)
    _reported: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.registrar = Registrar(self.registries)
        for hook in self.registries.by_hook():
            arguments = {"register": self.registrar.for_hook(hook)}
            getattr(self.manager.hook, hook).call_historic(kwargs=arguments)

    @property
    def failures(self) -> list[PluginInfo]:
        return [info for info in self.infos if info.failure]

    @property
    def broken_files(self) -> list[str]:
        """One line for every single-file plugin that failed, since the user asked for that file by name."""
        named = (info for info in self.failures if info.name == f"{FILE}{info.package}")
        return [f"plugin {info.name} failed at {info.failure}" for info in named]

    @property
    def replaced(self) -> list[str]:
        """One line for every installed method, model ... that a plugin file replaces."""
        return [line for registry in self.registries.all() for line in registry.replaced]

    def lookup(self, registry: Registry, name: str) -> Any:
        """Return the object registered as `name`. Raises `UnknownName`, which also names failed plugins."""
        try:
            return registry.get(name)
        except UnknownName as error:
            failed = [f"  plugin {i.name} failed at {i.failure} (see `nmbench plugins`)" for i in self.failures]
            raise UnknownName("\n".join([str(error), *failed])) from None

    def add_observer(self, plugin: object, name: str) -> None:
        """Register an object of this process, such as a progress printer, whose observing hooks are then called.

        Classes that the object announces are registered under the origin `name`. If the object fails, this raises its
        exception and undoes the registration.
        """
        info = load_plugin(Candidate(PluginInfo(name, name, "", name), lambda: plugin), self)
        if info.failure:
            raise info.failure.error

    def remove(self, name: str) -> None:
        """Remove one plugin and all that it registered."""
        self.registries.forget(name)
        if self.manager.has_plugin(name):
            self.manager.unregister(name=name)

    def announce(self, hook: str, **arguments: Any) -> None:
        """Call every implementation of an observing hook, one at a time; log the first exception of each plugin."""
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            wanted = {name: arguments[name] for name in implementation.argnames}
            try:
                implementation.function(**wanted)
            except (Exception, SystemExit) as error:
                self._report_once(implementation.plugin_name, hook, error)

    def _report_once(self, plugin: str, hook: str, error: BaseException) -> None:
        if (plugin, hook) not in self._reported:
            self._reported.add((plugin, hook))
            logger.warning("plugin %s failed in %s: %s: %s", plugin, hook, type(error).__name__, error)


class Registrar:
    """Maker of the `register` functions that announcing hooks receive; `origin` is the plugin that registers now."""

    def __init__(self, registries: Registries) -> None:
        self.registries = registries
        self.origin = ""
        self.names: list[str] = []

    def for_hook(self, hook: str) -> Callable[[str, Any], None]:
        """Return the `register` function of one hook, which checks the class and its name."""
        registry = self.registries.by_hook()[hook]

        def register(name: str, obj: Any) -> None:
            check_object(hook, name, obj)
            registry.register(name, obj, self.origin)
            self.names.append(name)

        return register


def load_plugins(
    files: Sequence[str] = (),
    disabled: Iterable[str] = (),
    entry_points: Iterable[importlib.metadata.EntryPoint] | None = None,
) -> Plugins:
    """Load every installed plugin and the `files`, except those in `disabled` or in NMBENCH_DISABLE_PLUGINS.

    `entry_points` replaces those of the installed packages. Plugins that fail are in `failures` of the result. Raises
    `NMBenchError` for a file that does not exist.
    """
    plugins = Plugins(manager_with_specs())
    points = importlib.metadata.entry_points(group=GROUP) if entry_points is None else entry_points
    off = {name.strip() for name in (*disabled, *os.environ.get(DISABLE, "").split(",")) if name.strip()}
    distinct = {Path(text).resolve(): text for text in files}.values()
    for candidate in (*map(installed, sorted(points, key=sort_key)), *map(single_file, distinct)):
        if off & {candidate.info.entry, candidate.info.package}:
            plugins.infos.append(replace(candidate.info, disabled=True))
        else:
            plugins.infos.append(load_plugin(candidate, plugins))
    return plugins


HOOKABLE = (FunctionType, MethodType, staticmethod, classmethod)  # what pluggy takes for a hook, if it is marked


class Manager(pluggy.PluginManager):
    """A manager that looks for hooks of a module among its functions only, as pluggy would find, but sooner."""

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        """Return the options of a hook, or None for what is no hook."""
        if isinstance(plugin, ModuleType) and not isinstance(vars(plugin).get(name), HOOKABLE):
            return None
        return super().parse_hookimpl_opts(plugin, name)


def manager_with_specs() -> pluggy.PluginManager:
    manager = Manager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    if os.environ.get(TRACE):
        manager.trace.root.setwriter(sys.stderr.write)
        manager.enable_tracing()
    return manager


def sort_key(point: importlib.metadata.EntryPoint) -> tuple[str, str]:
    return (origin(point)[0], point.name)


def origin(point: importlib.metadata.EntryPoint) -> tuple[str, str]:
    """Return package and version of an entry point; a damaged installation may lack either."""
    return name_and_version(point.dist) if point.dist else ("unknown package", "?")


@functools.lru_cache(maxsize=64)
def name_and_version(package: importlib.metadata.Distribution) -> tuple[str, str]:
    """Return name and version of an installed package, whose metadata is parsed once for all its entry points."""
    metadata: Any = package.metadata
    return (metadata.get("Name") or "unknown package", metadata.get("Version") or "?")


def installed(point: importlib.metadata.EntryPoint) -> Candidate:
    """Return the plugin of an entry point."""
    package, version = origin(point)
    return Candidate(PluginInfo(f"{package} {version} [{point.name}]", package, version, point.name), point.load)


def single_file(text: str) -> Candidate:
    """Return the plugin in one file. Raises `NMBenchError` if no such Python file exists."""
    path = Path(text).resolve()
    if not path.is_file() or path.suffix != ".py":
        raise NMBenchError(f"plugin file {text} does not exist or is no .py file.")
    return Candidate(PluginInfo(f"{FILE}{text}", text, "", path.stem), lambda: import_file(path))


def import_file(path: Path) -> ModuleType:
    """Import a file under a module name of its own."""
    name = f"nmbench_file_{path.stem}_{zlib.crc32(str(path).encode()):08x}"  # two folders may hold one file name
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses need their module in it
    vars(module)[DIGEST] = digest_of(path)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def load_plugin(candidate: Candidate, plugins: Plugins) -> PluginInfo:
    """Import, check and register one plugin; an exception becomes its failure, and its registration is undone."""
    registrar = plugins.registrar
    registrar.origin, registrar.names = candidate.info.name, []
    stage = "import"
    try:
        plugin = candidate.load()
        plugin = plugin() if isinstance(plugin, type) else plugin
        stage = "signature"
        hooks = hooks_of(plugins.manager, plugin)
        refuse_second(plugins.manager, plugin, candidate.info.name)
        stage = "register"
        deprecations = register(plugins.manager, plugin, candidate.info.name)
        names = tuple(registrar.names)
        return replace(candidate.info, hooks=hooks, registered=names, deprecations=deprecations)
    except (Exception, SystemExit) as error:
        if stage == "register":  # earlier stages register nothing, and the name may be that of another plugin
            plugins.remove(candidate.info.name)
        return replace(candidate.info, failure=PluginFailure(stage, error))


def register(manager: pluggy.PluginManager, plugin: object, name: str) -> tuple[str, ...]:
    """Register one plugin, for which pluggy then calls the announcing hooks; return its deprecation warnings.

    The warnings are issued again afterwards, so that the tests of the plugin see them.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        manager.register(plugin, name)
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    old = [warning for warning in caught if issubclass(warning.category, (DeprecationWarning, FutureWarning))]
    return tuple(" ".join(str(warning.message).split()) for warning in old)
