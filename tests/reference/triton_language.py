"""Triton's language as it is for compiled programs.

The interpreter replaces functions of `triton.language` while a program runs, and puts them back; but where an
interpreted program calls an interpreted function, Triton replaces what that function sees once more, for good. A
function of Triton's own, such as `sum`, sees another module than the program, `triton.language.core`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest

State = list[tuple[Any, dict[str, Any]]]


def state() -> State:
    """What the modules and classes of the language hold that the interpreter changes."""
    language = importlib.import_module("triton.language")
    core = language.core
    owners = (language, core, language.math, core.tensor, core.dtype, core.condition, core.tensor_descriptor_base)
    return [(owner, dict(vars(owner))) for owner in owners]


@functools.cache
def untouched() -> State:
    """The state at the first call, which must come before any program is interpreted."""
    return state()


def restore(saved: State) -> None:
    for owner, before in saved:
        for name in vars(owner).keys() - before.keys():
            delattr(owner, name)
        for name, value in before.items():
            if vars(owner).get(name) is not value:
                setattr(owner, name, value)


@contextlib.contextmanager
def restored(inside: State | None = None) -> Iterator[None]:
    """Whatever happens in the context, the language is as before at its end; it begins with `inside`, if given."""
    untouched()
    before = state()
    restore(inside or [])
    try:
        yield
    finally:
        restore(before)


@contextlib.contextmanager
def interpreted(*names: str, own: Sequence[str] = ()) -> Iterator[ModuleType]:
    """The first module of `names`, whose programs run in Triton's interpreter, beside those that a GPU would compile.

    `names`: all modules with programs that it uses. `own`: functions of Triton's own that they call, which became
    programs to be compiled when Triton was imported.
    """
    triton = pytest.importorskip("triton", reason="Triton is not installed, as with torch for CPUs")
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    with restored():
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = True
            module = importlib.import_module(names[0])
            for name in own:
                setattr(triton.language, name, triton.jit(getattr(triton.language, name).fn))
        for name in names:
            del sys.modules[name]
        sys.modules.update(others)
        yield module


@contextlib.contextmanager
def compiled() -> Iterator[None]:
    """Triton's language as a GPU compiles it, also between tests that use the interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed, as with torch for CPUs")
    with restored(untouched()):
        yield
