"""Published mask files: from the Hugging Face hub, through its cache, or from a file that the user has."""

from __future__ import annotations

from pathlib import Path

from nmbench.cli.published.table import MaskFile
from nmbench.errors import NMBenchError


def mask_path(masks: MaskFile, given: Path | None = None) -> Path:
    """Return the path of a mask file: the file `given`, or a copy from the hub. Raises `NMBenchError` for neither."""
    if given is None:
        return downloaded(masks)
    if not given.exists():
        raise NMBenchError(f"mask file {given} does not exist; give {masks}.")
    return given


def downloaded(masks: MaskFile) -> Path:
    """Return the path of the hub's file in the local cache. Raises `NMBenchError` with a remedy."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(masks.repository, masks.file))
    except Exception as error:  # the hub's library raises many kinds, among them plain OSError and ValueError
        said = (str(error).splitlines() or [""])[0][:200]
        raise NMBenchError(
            f"masks {masks} cannot be had ({type(error).__name__}: {said}); give --masks FILE, or the other lines with "
            f"--only LABEL."
        ) from error
