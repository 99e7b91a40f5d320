"""Comparison of an export's files with the SHA-256 checksums in its mask file."""

from __future__ import annotations

from pathlib import Path

from nmbench.artifacts.artifact import Artifact, Unreadable, one_line
from nmbench.artifacts.kept_masks import file_digest


def changed_files(artifact: Artifact) -> list[str]:
    """Names of files that changed since they were written, or are gone.

    Raises `Unreadable` if the artifact has no checksums, or a file cannot be read.
    """
    recorded = artifact.about.get("sha256")
    if not isinstance(recorded, dict) or not recorded:
        raise Unreadable(f"{artifact.path} has no checksums; `nmbench export` records them in its mask file.")
    return [name for name, digest in recorded.items() if digest_of(artifact, name) != digest]


def digest_of(artifact: Artifact, name: str) -> str | None:
    """SHA-256 of a file in the folder, None if it is missing.

    Raises `Unreadable` if `name` is more than a file name, as a path out of the folder would be.
    """
    if Path(name).name != name:
        raise Unreadable(f"{artifact.path} has a checksum for {name!r}, which is not the name of a file in it.")
    path = Path(artifact.path) / name
    try:
        return file_digest(path) if path.is_file() else None
    except OSError as error:
        raise Unreadable(f"{path} cannot be read: {one_line(error)}.") from error
