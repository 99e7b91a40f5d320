"""Digest of the source files of a method, so that rows made before an edit of a plugin are not taken for its rows."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

DIGEST = "__nmbench_code__"  # attribute of a module that caches its digest
BUILT_IN = ("nmbench", "nmbench_plugins")  # packages whose version is in every record


def code_of(method: type) -> dict[str, str]:
    """Return `{"code": digest}` over the source file of a method or, in a package, over all files of the package.

    Empty for built-in methods, and for code without a file, as in a notebook. Computed once per module: a later edit of
    the file does not change the imported code.
    """
    top = method.__module__.partition(".")[0]
    module = sys.modules.get(top)
    file = getattr(module, "__file__", None)
    if top in BUILT_IN or file is None or not Path(file).is_file():
        return {}
    path = Path(file)
    cache = vars(module)
    if DIGEST not in cache:
        cache[DIGEST] = digest_of(path.parent if path.name == "__init__.py" else path)
    return {"code": cache[DIGEST]}


def digest_of(path: Path) -> str:
    """Return the SHA-256, 16 hex digits, over name and bytes of a Python file, or of all Python files of a folder."""
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        total.update(f"{file.relative_to(path.parent)} {len(content)};".encode())
        total.update(content)
    return total.hexdigest()[:16]
