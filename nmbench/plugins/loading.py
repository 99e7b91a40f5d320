"""Finds plugins and lets them register, one at a time, each guarded: a broken one never stops the others.

A plugin is a module, class or object with functions marked `@nmbench.hookimpl`, named by an entry point of the group
`nmbench` or given as a single file. Every failure is attributed to its plugin and to a stage (import, signature,
register), and what a half-registered plugin left behind is rolled back.
"""

from __future__ import annotations

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
from types import ModuleType
from typing import Any

import pluggy

from nmbench.errors import NMBenchError, UnknownName
from nmbench.plugins import hookspecs
from nmbench.plugins.checking import check_object, hooks_of, refuse_second
from nmbench.plugins.registry import Registries, Registry
from nmbench.plugins.source_digest import KNOWN, digest_of

GROUP = "nmbench"
DISABLE = "NMBENCH_DISABLE_PLUGINS"
TRACE = "NMBENCH_TRACE"
logger = logging.getLogger("nmbench")


@dataclass(frozen=True)
class PluginFailure:
    """Where and why a plugin failed; `error` is the original exception."""

    stage: str
    error: BaseException

    def __str__(self) -> str:
        if isinstance(self.error, NMBenchError):
            return f"{self.stage}: {self.error}"
        return f"{self.stage}: {type(self.error).__name__}: {self.error}"


@dataclass(frozen=True)
class PluginInfo:
    """What `nmbench plugins` shows of one plugin. `name` is `package version [entry]` or `file PATH`."""

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
    """A plugin that is not imported yet."""

    info: PluginInfo
    load: Callable[[], Any]


@dataclass
class Plugins:
    """All plugins of one process: their registries, what is known of each, and the observers among them."""

    manager: pluggy.PluginManager
    registries: Registries = field(default_factory=Registries)
    infos: list[PluginInfo] = field(default_factory=list)
    _silenced: set[tuple[str, str]] = field(default_factory=set)

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
        """One line for every single file that failed: whoever names a file wants it."""
        named = (info for info in self.failures if info.name == f"file {info.package}")
        return [f"plugin {info.name} failed at {info.failure}; nothing of it is used." for info in named]

    def lookup(self, registry: Registry, name: str) -> Any:
        """The object registered as `name`. Raises `UnknownName`, which also names failed plugins."""
        try:
            return registry.get(name)
        except UnknownName as error:
            failed = [f"  plugin {i.name} failed at {i.failure} (see `nmbench plugins`)" for i in self.failures]
            raise UnknownName("\n".join([str(error), *failed])) from None

    def add_observer(self, plugin: object, name: str) -> None:
        """Register an object of this process, such as a progress printer, whose observing hooks are then called.

        What it announces is registered too, as of `name`. Raises what the object fails with, and leaves no trace of it.
        """
        info = admit(Candidate(PluginInfo(name, name, "", name), lambda: plugin), self)
        if info.failure:
            raise info.failure.error

    def remove(self, name: str) -> None:
        """Take one plugin out, with everything it registered."""
        self.registries.forget(name)
        if self.manager.has_plugin(name):
            self.manager.unregister(name=name)

    def announce(self, hook: str, **arguments: Any) -> None:
        """Call every implementation of an observing hook, one at a time; one that raises is reported once."""
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            wanted = {name: arguments[name] for name in implementation.argnames}
            try:
                implementation.function(**wanted)
            except (Exception, SystemExit) as error:
                self._report_once(implementation.plugin_name, hook, error)

    def _report_once(self, plugin: str, hook: str, error: BaseException) -> None:
        if (plugin, hook) not in self._silenced:
            self._silenced.add((plugin, hook))
            logger.warning("plugin %s failed in %s: %s: %s", plugin, hook, type(error).__name__, error)


class Registrar:
    """The `register` function that hooks are handed. It knows which plugin is speaking, and through which hook."""

    def __init__(self, registries: Registries) -> None:
        self.registries = registries
        self.origin = ""
        self.names: list[str] = []

    def for_hook(self, hook: str) -> Callable[[str, Any], None]:
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
    """Load every installed plugin and the `files`, except those `disabled` (here or in NMBENCH_DISABLE_PLUGINS).

    `entry_points` replaces the installed ones. Raises `NMBenchError` for a file that does not exist; a plugin that
    fails is kept in `failures`.
    """
    plugins = Plugins(manager_with_specs())
    points = importlib.metadata.entry_points(group=GROUP) if entry_points is None else entry_points
    off = {name.strip() for name in (*disabled, *os.environ.get(DISABLE, "").split(",")) if name.strip()}
    distinct = {Path(text).resolve(): text for text in files}.values()
    for candidate in (*map(installed, sorted(points, key=order)), *map(single_file, distinct)):
        if off & {candidate.info.entry, candidate.info.package}:
            plugins.infos.append(replace(candidate.info, disabled=True))
        else:
            plugins.infos.append(admit(candidate, plugins))
    return plugins


def manager_with_specs() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    if os.environ.get(TRACE):
        manager.trace.root.setwriter(sys.stderr.write)
        manager.enable_tracing()
    return manager


def order(point: importlib.metadata.EntryPoint) -> tuple[str, str]:
    return (origin(point)[0], point.name)


def origin(point: importlib.metadata.EntryPoint) -> tuple[str, str]:
    """Package and version behind an entry point; a damaged installation may lack either."""
    metadata: Any = point.dist.metadata if point.dist else {}
    return (metadata.get("Name") or "unknown package", metadata.get("Version") or "?")


def installed(point: importlib.metadata.EntryPoint) -> Candidate:
    """The plugin behind an entry point."""
    package, version = origin(point)
    return Candidate(PluginInfo(f"{package} {version} [{point.name}]", package, version, point.name), point.load)


def single_file(text: str) -> Candidate:
    """The plugin in one file. Raises `NMBenchError` if there is no such Python file."""
    path = Path(text).resolve()
    if not path.is_file() or path.suffix != ".py":
        raise NMBenchError(f"plugin file {text} does not exist or is no .py file.")
    return Candidate(PluginInfo(f"file {text}", text, "", path.stem), lambda: import_file(path))


def import_file(path: Path) -> ModuleType:
    name = f"nmbench_file_{path.stem}_{zlib.crc32(str(path).encode()):08x}"  # two folders may hold one file name
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    vars(module)[KNOWN] = digest_of(path)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def admit(candidate: Candidate, plugins: Plugins) -> PluginInfo:
    """Import, check and register one plugin; whatever it raises becomes its failure, and it leaves no trace."""
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
        if stage == "register":  # before that it has left nothing, and its name may be another's
            plugins.remove(candidate.info.name)
        return replace(candidate.info, failure=PluginFailure(stage, error))


def register(manager: pluggy.PluginManager, plugin: object, name: str) -> tuple[str, ...]:
    """Register one plugin, for which pluggy then replays the announcing hooks; return what is deprecated about it.

    The warnings are given on as well, so that a plugin's own tests see them.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        manager.register(plugin, name)
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    old = [warning for warning in caught if issubclass(warning.category, (DeprecationWarning, FutureWarning))]
    return tuple(" ".join(str(warning.message).split()) for warning in old)
