"""Checks of a plugin: its hooks, their parameters, and the classes that it registers.

pluggy itself never calls a misspelt hook, never passes a parameter with a default, accepts a keyword-only parameter
that fails at the call, and lets wrappers change the result of another plugin. These checks refuse all four.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from typing import Any

import pluggy

from nmbench.errors import PluginError, did_you_mean
from nmbench.methods import (
    BlockRepair,
    LayerRepair,
    MaskLearner,
    MaskSource,
    Method,
    Refiner,
    Scorer,
    Solver,
    WeightLearner,
)
from nmbench.options import PRESET, READERS, alternatives
from nmbench.plugins import hookspecs
from nmbench.sources import Dataset, Metric, ModelSource, Reporter

PREFIX = "nmbench_"
BASES: dict[str, tuple[type, ...]] = {  # announcing hook -> bases of what plugins register through it
    "nmbench_register_baselines": (Scorer, Solver, Refiner, MaskSource),
    "nmbench_register_mask_learners": (MaskLearner,),
    "nmbench_register_repairs": (LayerRepair, BlockRepair, WeightLearner),
    "nmbench_register_models": (ModelSource,),
    "nmbench_register_datasets": (Dataset,),
    "nmbench_register_metrics": (Metric,),
    "nmbench_register_reporters": (Reporter,),
}
FORBIDDEN = ("hookwrapper", "wrapper", "tryfirst", "trylast")


def hooks_of(manager: pluggy.PluginManager, plugin: object) -> tuple[str, ...]:
    """Return the names of the hooks that a plugin implements.

    Raises `PluginError` for a hook that pluggy would ignore or misuse, and for a plugin without any.
    """
    found = []
    for name in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, name)
        if options is None:
            if name in known_hooks() and callable(getattr(plugin, name)):
                raise PluginError(f"function {name} is not marked as a hook; put @nmbench.hookimpl above it.")
            continue
        hook = options.get("specname") or name
        check_hook(hook, getattr(plugin, name), dict(options))
        found.append(hook)
    if not found:
        raise PluginError(f"it implements no hook; the hooks are {', '.join(sorted(known_hooks()))}.")
    return tuple(found)


def refuse_second(manager: pluggy.PluginManager, plugin: object, name: str) -> None:
    """Raise `PluginError` for a plugin that is already loaded, and for a second plugin of the same name."""
    for known, other in manager.list_name_plugin():
        if other is plugin or known == name:
            raise PluginError(f"it is already loaded as {known}; remove one of the two.")


@functools.cache
def known_hooks() -> dict[str, Any]:
    """Return the hook specifications by name."""
    return {name: spec for name, spec in vars(hookspecs).items() if name.startswith(PREFIX)}


def check_hook(hook: str, function: Any, options: dict[str, Any]) -> None:
    """Raise `PluginError` unless `function` is a plain implementation of an existing hook."""
    specs = known_hooks()
    if hook not in specs:
        raise PluginError(f"hook {hook!r} does not exist.{did_you_mean(hook, specs)}")
    if used := [name for name in FORBIDDEN if options.get(name)]:
        raise PluginError(f"hook {hook} uses {used[0]}; plugins are called one by one and cannot wrap each other.")
    expected = parameters_of(specs[hook])
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name not in expected:
            listed = ", ".join(expected)
            raise PluginError(f"hook {hook} has no parameter {parameter.name!r}; it takes {listed}.")
        if parameter.default is not parameter.empty or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            raise PluginError(
                f"parameter {parameter.name!r} of hook {hook} must be plain: no default, not keyword-only."
            )


@functools.cache
def parameters_of(spec: Any) -> list[str]:
    return list(inspect.signature(spec).parameters)


def check_object(hook: str, name: str, obj: Any) -> None:
    """Raise `PluginError` unless `obj` is a class of the kind that `hook` registers and its options have defaults."""
    bases = BASES[hook]
    if not isinstance(obj, type) or not issubclass(obj, bases):
        listed = " or ".join(f"nmbench.{base.__name__}" for base in bases)
        raise PluginError(f"{name!r} must be a class derived from {listed}; {obj!r} is not.")
    if undecorated := [key for key, value in vars(obj).items() if isinstance(value, dataclasses.Field)]:
        raise PluginError(f"{name!r} declares option {undecorated[0]!r}; put @dataclass(frozen=True) above its class.")
    if issubclass(obj, Method):
        check_options(name, obj, bases)
    required = [f.name for f in dataclass_fields(obj) if f.init and no_default(f)]
    if required:
        raise PluginError(f"option {required[0]!r} of {name!r} needs a default value.")
    check_work(name, obj, next(base for base in bases if issubclass(obj, base)))


def check_work(name: str, cls: type, base: Any) -> None:
    """Raise `PluginError` for a class that does not override the method of its kind, such as `score` of a scorer."""
    wanted = base.work_method
    if getattr(cls, wanted) is not getattr(base, wanted):
        return
    own = [key for key, value in inspect.getmembers(cls, callable) if not hasattr(base, key)]
    raise PluginError(
        f"class {cls.__name__} of {name!r} has no method {wanted!r}, which every nmbench.{base.__name__} needs."
        f"{did_you_mean(wanted, own, 'Is it what you call')}"
    )


OVERRIDABLE = (
    "sequential",
    "skip_tokens",
    "windows",
    "minibatch",
    "dense_path",
)  # properties; an option may replace them


def check_options(name: str, cls: type, bases: tuple[type, ...]) -> None:
    """Raise `PluginError` for an option that hides an attribute of its base, and for a type not readable from text."""
    base = next(base for base in bases if issubclass(cls, base))
    inherited = {field.name for field in dataclass_fields(base)}
    try:
        hints = types_of(cls)
    except Exception as error:
        raise PluginError(f"the types of the options of {name!r} cannot be read: {error}.") from error
    for item in dataclass_fields(cls):
        if item.name == PRESET or (hasattr(base, item.name) and item.name not in (*inherited, *OVERRIDABLE)):
            raise PluginError(f"option {item.name!r} of {name!r} has a name that nmbench reserves; rename it.")
        if unreadable := [kind for kind in alternatives(hints[item.name]) if kind not in (*READERS, type(None))]:
            raise PluginError(
                f"option {item.name!r} of {name!r} is {unreadable[0]}; options are int, float, bool, str or none."
            )
        if item.name in inherited and hints[item.name] != types_of(base)[item.name]:
            raise PluginError(
                f"option {item.name!r} of {name!r} has another type than in nmbench.{base.__name__}; keep that type, "
                f"or rename the option."
            )


@functools.lru_cache(maxsize=256)
def types_of(cls: type) -> dict[str, Any]:
    """Return the types of the options of a class, which are evaluated once."""
    return typing.get_type_hints(cls)


def dataclass_fields(cls: type) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()


def no_default(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
