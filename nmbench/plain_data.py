"""Plain data of JSON and TOML: read, checked against annotated types, digested."""

from __future__ import annotations

import hashlib
import json
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nmbench.errors import NMBenchError, unknown
from nmbench.options import alternatives, type_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def check_form(content: Any, form: Mapping[str, Any], where: str) -> None:
    """Raise `NMBenchError` unless plain data has only keys of `form`, and values of the types in `form`."""
    if not isinstance(content, Mapping):
        raise NMBenchError(f"{where} must be a table, not {content!r}.")
    for name, value in content.items():
        if name not in form:
            raise unknown("key", str(name), form, f" in {where}")
        if not fits(value, form[name]):
            raise NMBenchError(f"{name} in {where} must be {in_words(form[name])}, not {value!r}.")


def fits(value: Any, hint: Any) -> bool:
    """Return True if plain data is of an annotated type; a text is not a list, and a truth value is not a number."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, (list, tuple)) and all(fits(item, inner[0]) for item in value)
    if typing.get_origin(hint) is Mapping:
        return isinstance(value, Mapping) and all(fits(item, inner[1]) for item in value.values())
    return hint is Any or type(value) in alternatives(hint)


def in_words(hint: Any) -> str:
    """Return an annotated type in words: int or none, a list of str, a table of str."""
    inner, kind = typing.get_args(hint), typing.get_origin(hint)
    if kind is tuple:
        return f"a list of {in_words(inner[0])}"
    if kind is Mapping:
        return "a table" if inner[1] is Any else f"a table of {in_words(inner[1])}"
    return type_name(hint)


def read_toml(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file as plain data. Raises `NMBenchError` for a missing file or bad TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NMBenchError(f"configuration file {path} does not exist.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise NMBenchError(f"configuration file {path} is not TOML: {error}.") from None


def refuse_duplicates(kind: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            remedy = "; give one of them another LABEL=NAME" if kind == "label" else ""
            raise NMBenchError(f"{kind} {name!r} is given twice{remedy}.")


def digest(content: Any) -> str:
    """Return the digest of plain data: 16 hex digits of SHA-256 over canonical JSON."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
