"""Run directories made by hand: records, losses and masks without a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tomli_w
import torch

from nmbench.comparison import paired
from nmbench.pattern import Pattern
from nmbench.results.files import save_masks, write_tensors
from nmbench.results.ranking import file_name

WINDOWS = 24
TEXT = "plays@64"
ENVIRONMENT = {"nmbench": "0.1.0", "torch": "2.13.0", "device": "cpu"}


def losses_of(level: float, noise: float = 0.01, seed: int = 0) -> torch.Tensor:
    """Losses of the windows of a text, float64: those of one hard and easy text, raised by `level`."""
    text = torch.rand(WINDOWS, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    own = torch.randn(WINDOWS, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return 3 + text + level + noise * own


def record_of(label: str, pattern: str | None = "2:4", seed: int | None = 0, **fields: Any) -> dict[str, Any]:
    """One record of format 2; `fields` replace its own."""
    level = fields.pop("level", 0.0)
    found = losses_of(level, 0.01 if pattern else 0.0, hash_of(label, seed))
    value = {"value": float(found.mean().exp()), "stderr": 0.4, "n": WINDOWS, "lower_is_better": True}
    over = paired(found, losses_of(0.0, 0.0))
    interval = {"mean": over.mean, "low": over.low, "high": over.high, "windows": WINDOWS}
    seconds = {"prune": fields.pop("prune", 1.0), "evaluate": 1.0, "total": 2.0}
    whole = {
        "format": 2, "label": label, "method": label if pattern else None, "options": {}, "content": {},
        "started_from": None, "repairs": None, "pattern": pattern, "pattern_for": {}, "seed": seed, "model": "demo",
        "sliding_window": None, "coverage": None, "calibration": "demo", "calibration_digest": "c" * 16,
        "sampled": None, "pool_digest": None, "job_digest": "j" * 16, "spec_digest": "s" * 16,
        "protocol_digest": "a" * 16, "environment": ENVIRONMENT, "status": "ok", "strict": bool(pattern),
        "proof": None, "measured_digest": "m" * 64, "weights_changed": False, "metrics": {f"ppl:{TEXT}": value},
        "against_dense": {TEXT: interval} if pattern else {},
        "seconds": {**seconds, "prune_cpu": None, "evaluate_cpu": None, "cpu_share": None},
        "peak_bytes": {"host": 2**30, "host_growth": 2**20, "device": None},
        "cost": {"forward_tokens": 1000, "backward_tokens": 0, "unique_tokens": 0, "selection_tokens": 0},
        "kept_bytes": None, "notes": {}, "layer_notes": {}, "figures": {}, "experts": {}, "copied_from": None,
        "curve": [], "doubts": [], "unranked": [],
    }  # fmt: skip
    return {**whole, **fields, "losses": found}


def hash_of(label: str, seed: int | None) -> int:
    """A number of a row, the same in every process."""
    return sum(label.encode()) * 7 + (seed or 0)


def write_run(path: Path, records: Iterable[Mapping[str, Any]], spec: Mapping[str, Any] | None = None) -> Path:
    """Write a run directory: records, their losses if they have any, and a specification."""
    path.mkdir(parents=True, exist_ok=True)
    lines = []
    for record in records:
        plain = {name: value for name, value in record.items() if name != "losses"}
        lines.append(json.dumps(plain))
        if record.get("losses") is not None and plain["status"] == "ok":
            write_tensors(path / "losses" / f"{file_name(plain)}.safetensors", {TEXT: record["losses"]}, {})
    (path / "records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if spec is not None:
        (path / "spec.toml").write_text(tomli_w.dumps(spec), encoding="utf-8")
    return path


def write_masks(path: Path, record: Mapping[str, Any], seed: int, layers: int = 2) -> dict[str, torch.Tensor]:
    """Write random 2:4 masks of a record into its run directory; return them."""
    generator, pattern = torch.Generator().manual_seed(seed), Pattern(2, 4)
    masks = {
        f"model.layers.{n}.mlp.up_proj": pattern.top(torch.rand(6, 16, generator=generator)) for n in range(layers)
    }
    patterns = dict.fromkeys(masks, pattern)
    save_masks(path / "masks" / f"{file_name(record)}.safetensors", masks, patterns, {})
    return masks
