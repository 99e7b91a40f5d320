"""Another cuSPARSELt than the one that torch was installed with, and which one is loaded. Imports no torch.

torch's CUDA library names `libcusparseLt.so.0` and finds it by a path of its own, which `LD_LIBRARY_PATH` does not
override. A library of that name that the process has already loaded is taken instead, although torch then loads its own
as well, by its full path: of several, the first one loaded is the one that is called. `torch.backends.cusparselt` tells
the release whose header torch was compiled with; the release that runs is asked of the library itself. The
headers of 0.8.0, 0.8.1 and 0.10.0 declare the same types and functions, so that torch can call any of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nmbench.errors import NMBenchError

NAME = "libcusparseLt.so.0"
VERSION_PARTS = (0, 1, 2)  # major, minor and patch, as `libraryPropertyType` of CUDA counts them


def preload_cusparselt(path: Path) -> Path:
    """Load cuSPARSELt from `path`, a library or a folder that holds one at any depth, before torch; return its path.

    Raises `NMBenchError` if there is none, if it cannot be loaded, or if this process has loaded another one.
    """
    found = library_in(path)
    before = loaded_path()
    if before is not None and before != found.resolve():
        raise NMBenchError(
            f"--cusparselt {path} comes too late: this process has loaded {before} with torch; give the option to "
            f"`nmbench speed` in a process of its own."
        )
    try:
        ctypes.CDLL(str(found), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise NMBenchError(f"--cusparselt {path} cannot be loaded: {error}.") from error
    return found


def library_in(path: Path) -> Path:
    """Return the library at `path`, or the first one in a folder. Raises `NMBenchError` if there is none."""
    if path.is_file():
        return path
    found = sorted(path.rglob(NAME))
    if not found:
        raise NMBenchError(
            f"--cusparselt {path} holds no {NAME}; give the library, or the folder of "
            f"`pip install --no-deps --target FOLDER nvidia-cusparselt-cu13`."
        )
    return found[0]


def loaded_path(libraries: Callable[[], Sequence[str]] | None = None) -> Path | None:
    """Return the path of the cuSPARSELt that torch calls; None without one, or where that is unknown.

    `libraries`: returns the paths of all libraries of this process, in the order in which they were loaded.
    """
    return next((Path(path) for path in (libraries or loaded_libraries)() if "/libcusparseLt.so" in path), None)


class Object(ctypes.Structure):
    """The first two members of `struct dl_phdr_info` (man 3 dl_iterate_phdr)."""

    _fields_ = (("address", ctypes.c_void_p), ("name", ctypes.c_char_p))


VISITOR = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Object), ctypes.c_size_t, ctypes.c_void_p)


def loaded_libraries() -> list[str]:
    """Return the paths of the libraries of this process in the order in which they were loaded; none without glibc."""
    names: list[str] = []

    def note(found: Any, size: int, data: Any) -> int:
        names.append((found.contents.name or b"").decode(errors="replace"))
        return 0

    each = getattr(ctypes.CDLL(None), "dl_iterate_phdr", None)
    if each is not None:
        each(VISITOR(note), None)
    return names


def version_of(library: Path) -> str:
    """Return the release of a cuSPARSELt as "0.10.0"; no GPU is needed. Raises `NMBenchError` if it does not tell."""
    try:
        ask = ctypes.CDLL(str(library)).cusparseLtGetProperty
    except (OSError, AttributeError) as error:
        raise NMBenchError(f"{library} is not a cuSPARSELt: {error}.") from error
    value = ctypes.c_int()
    parts = []
    for part in VERSION_PARTS:
        if ask(part, ctypes.byref(value)):
            raise NMBenchError(f"{library} does not tell its version; a cuSPARSELt of 0.4 or newer does.")
        parts.append(str(value.value))
    return ".".join(parts)


def loaded_version() -> str | None:
    """Return the release of the cuSPARSELt that is loaded, or None where none is found."""
    library = loaded_path()
    return None if library is None else version_of(library)
