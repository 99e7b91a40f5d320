"""The record behind masks that lie in a run directory: their cost is that of their row."""

from __future__ import annotations

from pathlib import Path

from nmbench.artifacts.reading import row_masks
from nmbench.results.format import Record
from nmbench.results.ranking import file_name
from nmbench.results.results import load_results


def row_record(ref: str) -> Record | None:
    """The record of the row that `RUN_DIRECTORY:LABEL` or `RUN_DIRECTORY/masks/NAME.safetensors` names, else None.

    Raises `NMBenchError` if the run directory cannot be read.
    """
    path = Path(ref) if Path(ref).exists() else row_masks(ref)
    if path is None or path.parent.name != "masks" or not (path.parents[1] / "records.jsonl").is_file():
        return None
    records = load_results(path.parents[1]).records
    return next((record for record in records if file_name(record) == path.stem), None)
