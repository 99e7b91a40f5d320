"""Options of a method: the fields of its frozen dataclass, read from text and described for users.

A method declares `steps: int = option(500, "number of updates")`; `--set maskpro.steps=900` and `nmbench methods
maskpro` both come from that one line.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from nmbench.errors import NMBenchError, unknown

T = TypeVar("T")
PRESET = "preset"  # not a field: the name of a set of values, which explicit options override


def option(default: Any, help: str, *, unit: str = "", choices: tuple[Any, ...] = ()) -> Any:
    """Declare one option of a method: default, description, unit and, if few, its legal values."""
    return dataclasses.field(default=default, metadata={"help": help, "unit": unit, "choices": choices})


@dataclasses.dataclass(frozen=True)
class OptionInfo:
    """One option as `nmbench methods NAME` prints it."""

    name: str
    type: str
    default: Any
    help: str
    unit: str
    choices: tuple[Any, ...]


def describe(cls: type) -> list[OptionInfo]:
    """List the options of a method class, in the order of their declaration."""
    hints = typing.get_type_hints(cls)
    return [
        OptionInfo(
            name=field.name,
            type=type_name(hints[field.name]),
            default=None if field.default is dataclasses.MISSING else field.default,
            help=field.metadata.get("help", ""),
            unit=field.metadata.get("unit", ""),
            choices=field.metadata.get("choices", ()),
        )
        for field in dataclasses.fields(cls)
    ]


def build(cls: type[T], given: Mapping[str, Any], label: str) -> T:
    """Return the method with the options `given` (text or values); explicit options override a preset.

    Raises `NMBenchError` naming `label.option` for an unknown option, a value of the wrong type or an illegal choice.
    """
    presets: Mapping[str, Mapping[str, Any]] = getattr(cls, "presets", {})
    explicit = {name: value for name, value in given.items() if name != PRESET}
    preset = given.get(PRESET)
    if preset is not None and (not isinstance(preset, str) or preset not in presets):
        raise unknown("preset", str(preset), presets, f" of {label}")
    values = {**(presets[preset] if preset is not None else {}), **explicit}
    infos = {info.name: info for info in describe(cls)}
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in infos:
            raise unknown("option", name, [*infos, *([PRESET] if presets else [])], f" of {label}")
    return cls(**{name: convert(value, hints[name], infos[name], label) for name, value in values.items()})


def check_least(method: Any, name: str, least: Mapping[str, float]) -> None:
    """Raise `NMBenchError` for an option of the method `name` that is NaN or below its least value; None is not set."""
    for option_name, value in least.items():
        given = getattr(method, option_name)
        if given is not None and not given >= value:
            raise NMBenchError(f"option {name}.{option_name} must be at least {value}, not {given}.")


def resolved(method: Any) -> dict[str, Any]:
    """Return every option of a method with its value, for the record."""
    return dataclasses.asdict(method)


def typed(cls: type, given: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Return the options `given` (text or values) as values, so that `yes` and `true` are equal.

    None becomes the text `none`, since TOML has no null. Raises `NMBenchError` as `build` does.
    """
    method: Any = build(cls, given, label)
    values = {name: value if name == PRESET else getattr(method, name) for name, value in given.items()}
    return {name: "none" if value is None else value for name, value in values.items()}


def convert(value: Any, hint: Any, info: OptionInfo, label: str) -> Any:
    """Read one option value as the annotated type of its field.

    Raises `NMBenchError` for a value of another type and for an illegal choice.
    """
    try:
        result = read(value, hint)
    except ValueError:
        raise NMBenchError(f"option {label}.{info.name} must be {info.type}, not {value!r} ({info.help}).") from None
    if isinstance(result, float) and not math.isfinite(result):  # JSON has no name for it
        raise NMBenchError(f"option {label}.{info.name} must be a finite number, not {value!r} ({info.help}).")
    if info.choices and result is not None and result not in info.choices:
        listed = ", ".join(str(choice) for choice in info.choices)
        raise NMBenchError(f"option {label}.{info.name} must be one of {listed}, not {value!r}.")
    return result


def read(value: Any, hint: Any) -> Any:
    """Convert `value`, text or already typed, to `hint` (int, float, bool, str, or a union of these and None).

    Raises `ValueError` if no type of the union can read the value.
    """
    members = alternatives(hint)
    if type(None) in members:
        if value is None or (isinstance(value, str) and value.lower() in {"none", ""}):
            return None
        members = tuple(member for member in members if member is not type(None))
    for member in members:
        try:
            return READERS[member](value)
        except (ValueError, TypeError, OverflowError):
            continue
    raise ValueError(value)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the hint alone."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return typing.get_args(hint)
    return (hint,)


def type_name(hint: Any) -> str:
    """Return the name of a type for users: int, float, str or none."""
    return " or ".join("none" if member is type(None) else member.__name__ for member in alternatives(hint))


def read_bool(value: Any) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if isinstance(value, bool):
        return value
    if not isinstance(value, str) or value.lower() not in words:
        raise ValueError(value)
    return words[value.lower()]


def read_int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(value)
    return int(value)


def read_float(value: Any) -> float:
    if isinstance(value, bool) or (number := float(value)) != number:
        raise ValueError(value)
    return number


def read_str(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(value)
    return value


READERS = {bool: read_bool, int: read_int, float: read_float, str: read_str}
