"""The choice of the options of swaps: a grid on the demo, judged on the selection plays; no test play is read.

    python swaps_defaults.py --json results/swaps_defaults.json

Statistics come from windows of the calibration plays. One line is printed per finished setting: the mean loss over the
dense model's in nats, with the standard error of the paired difference. Takes about half an hour on two CPU cores;
settings in the file are not measured again.

Each setting is one run on one choice of windows. The standard error is that of the text, not of the mask: settings that
should differ little (3, 10 and 30 sweeps) are up to 0.04 nats apart. The defaults are not the best of this grid, which
prefers larger weights than a model of 30 blocks does (`nmbench_plugins.swaps.refiner`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from maskpro_defaults import write_texts

from nmbench import MethodSpec, Pattern, Pruned, PrunedModel, RunSpec, load_plugins
from nmbench.evaluation.subject import Subject
from nmbench.experiment.plan import checked
from nmbench.experiment.setup import Experiment, prepared
from nmbench.models.applying import apply
from nmbench.pruning.one_shot import prune_one_shot
from nmbench_plugins.sparsegpt import SparseGPT
from nmbench_plugins.swaps import Swaps
from nmbench_plugins.wanda import Wanda

FIGURES = ("seconds", "perplexity", "nats", "stderr", "notes")
INITS = {"wanda": Wanda(), "sparsegpt": SparseGPT(mask_only=True)}


def grid() -> list[dict[str, Any]]:
    """The settings that were tried."""
    shots: list[dict[str, Any]] = [{"method": name} for name in ("wanda", "sparsegpt")]
    local = {"residual_weight": 0, "skip_tokens": 0, "sweeps": 10}  # the layer's own outputs only
    targets = [
        {"dense_weight": weight, "sequential": turns, **local}
        for turns in (False, True)
        for weight in (0, 0.5, 0.75, 1)
    ]
    best = {"dense_weight": 0.75, "sequential": True, **local}
    shots += [*targets, {**best, "init": "sparsegpt"}]
    found = [{**setting, "pattern": pattern} for pattern in ("2:4", "4:8") for setting in shots]
    found += [{**target, "sweeps": sweeps, "pattern": "2:4"} for target in (targets[0], best) for sweeps in (1, 3, 30)]
    few = [{**target, "windows": 32, "pattern": "2:4"} for target in (targets[0], best)]
    many = [{**target, "windows": 512, "pattern": "2:4"} for target in (targets[0], best, targets[-1])]
    return [*found, *few, *many, *residual_grid()]


def residual_grid() -> list[dict[str, Any]]:
    """Settings that also compensate errors in the residual stream, with equal weights or one weight of 0."""
    alike = [{"dense_weight": weight, "residual_weight": weight} for weight in (0.2, 0.4, 0.6)]
    alone = [{"dense_weight": 0.6, "residual_weight": 0}, {"dense_weight": 0.2, "residual_weight": 0}]
    found = [
        {**target, "skip_tokens": skip, "sweeps": 4, "pattern": pattern}
        for pattern in ("2:4", "4:8")
        for target in alike
        for skip in (0, 1)
    ]
    found += [{**target, "skip_tokens": 1, "sweeps": 10, "pattern": "2:4"} for target in alike]
    found += [{**target, "skip_tokens": 1, "sweeps": 4, "pattern": "2:4"} for target in alone]
    return [{**setting, "sequential": True} for setting in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        experiment, text = start(write_texts(Path(folder)), args.device)
        dense = Subject(experiment.bundle, experiment.texts).losses(text, 256)
        rows = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else []
        for setting in grid():
            if not any(setting == {name: row[name] for name in row if name not in FIGURES} for row in rows):
                rows.append(measure(experiment, text, dense, setting))
                print(json.dumps(rows[-1]), flush=True)
                args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def start(folder: Path, device: str) -> tuple[Experiment, str]:
    """Load model and texts, with enough windows in the pool for every setting."""
    text = f"text:{folder}/judge.txt"
    spec = RunSpec(
        (MethodSpec("swaps", "swaps"),),
        calibration=f"jsonl:{folder}/learn.jsonl",
        windows=512,
        metrics=(f"ppl:{text}@256",),
        device=device,
    )
    plugins = load_plugins()
    return prepared(checked(spec, plugins)), text


def measure(experiment: Experiment, text: str, dense: torch.Tensor, setting: dict[str, Any]) -> dict[str, Any]:
    """Prune with one setting and return the loss over the dense model's, in nats."""
    options = {name: value for name, value in setting.items() if name not in ("method", "pattern", "windows")}
    method = INITS[setting["method"]] if "method" in setting else Swaps(**options)
    init = INITS[method.init] if isinstance(method, Swaps) else None
    patterns = dict.fromkeys(experiment.bundle.layers, Pattern.parse(setting["pattern"]))
    windows = experiment.pools[0].calibration[: setting.get("windows", 128)]
    began = time.perf_counter()
    pruned = prune_one_shot(experiment.bundle, experiment.dense, method, patterns, windows, "it", init=init).pruned
    seconds = time.perf_counter() - began
    apply(experiment.bundle, PrunedModel({name: Pruned(mask) for name, mask in pruned.masks.items()}))
    losses = Subject(experiment.bundle, experiment.texts).losses(text, 256)
    experiment.dense.restore()
    lost = losses - dense
    return {
        **setting,
        "seconds": round(seconds, 1),
        "perplexity": round(float(losses.mean().exp()), 2),
        "nats": round(float(lost.mean()), 4),
        "stderr": round(float(lost.std() / len(lost) ** 0.5), 4),
        "notes": dict(pruned.notes),
    }


if __name__ == "__main__":
    main()
