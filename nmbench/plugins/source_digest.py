"""What code a method is made of, so that a plugin that was edited is other work than before."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

KNOWN = "__nmbench_code__"  # where a module keeps its digest
OURS = ("nmbench", "nmbench_plugins")  # their version is in every record


def code_of(method: type) -> dict[str, str]:
    """`{"code": digest}` of the source files behind a method: its file or, in a package, all files of the package.

    Nothing for the built-in methods, or where there is no file, as in a notebook. Worked out once for every module:
    what was imported does not change with the file.
    """
    top = method.__module__.partition(".")[0]
    module = sys.modules.get(top)
    file = getattr(module, "__file__", None)
    if top in OURS or file is None or not Path(file).is_file():
        return {}
    path = Path(file)
    known = vars(module)
    if KNOWN not in known:
        known[KNOWN] = digest_of(path.parent if path.name == "__init__.py" else path)
    return {"code": known[KNOWN]}


def digest_of(path: Path) -> str:
    """SHA-256, 16 hex digits, over the names and bytes of a Python file, or of all those of a folder."""
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        total.update(f"{file.relative_to(path.parent)} {len(content)};".encode())
        total.update(content)
    return total.hexdigest()[:16]
