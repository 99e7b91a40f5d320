"""The choice of MaskPro's default options: a grid on the demo, judged on the selection plays; no test play is read.

    python maskpro_defaults.py --processes 8 --json results/maskpro_defaults.json

Every setting starts from the same initial masks and learns from windows of the calibration plays, some of which are
its selection windows. The figure is the paired difference of mean losses to the initial mask, in nats, with its
standard error. One line is printed per finished setting. Takes about two hours on two CPU cores; the figures in
results/maskpro_defaults_h200.json took five minutes on one GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from nmbench import MethodSpec, Pattern, Pruned, PrunedModel, RunSpec, load_plugins
from nmbench.evaluation.subject import Subject
from nmbench.experiment.plan import checked
from nmbench.experiment.setup import Experiment, prepared
from nmbench.models.applying import apply
from nmbench.pruning.learning import LearnTask
from nmbench.pruning.one_shot import prune_one_shot
from nmbench.results.files import MemoryCheckpoints
from nmbench_plugins.demo import DemoPlays
from nmbench_plugins.maskpro import MaskPro


def grid() -> list[dict[str, Any]]:
    """The settings that were tried, in two rounds."""
    first = [(c, lr, 8, 2000) for c in (4, 6, 8, 10) for lr in (0.1, 0.3, 1.0, 3.0, 10.0)]
    first += [(6, 1.0, 32, 2000), (8, 3.0, 32, 2000), (4, 0.3, 32, 2000)]
    second = [(5, lr, 8, 1000) for lr in (0.1, 0.15, 0.2, 0.3)] + [(6, lr, 8, 1000) for lr in (0.2, 0.3, 0.45)]
    second += [(4, lr, 8, 1000) for lr in (0.05, 0.1, 0.15)] + [(8, lr, 8, 1000) for lr in (0.5, 0.7)]
    second += [(10, lr, 8, 1000) for lr in (1.0, 1.5, 2.0)] + [(12, lr, 8, 1000) for lr in (2.0, 4.0)]
    second += [(5, 0.2, 4, 1000), (6, 0.3, 4, 1000), (10, 1.5, 4, 1000), (10, 1.0, 2, 1000)]
    second += [(6, 0.3, 16, 1000), (5, 0.2, 16, 1000), (10, 1.5, 32, 1000)]
    settings = [
        {"prior": float(c), "learning_rate": lr, "minibatch": size, "steps": steps}
        for c, lr, size, steps in (*first, *second)
    ]
    settings.append({"prior": 6.0, "learning_rate": 1.0, "minibatch": 8, "steps": 2000, "pattern": "4:8"})
    for c, lr in ((10.0, 1.0), (6.0, 0.3)):
        base = {"prior": c, "learning_rate": lr, "minibatch": 8, "steps": 1000}
        settings += [{**base, "pattern": "4:8"}, {**base, "init": "sparsegpt"}]
    return [*settings, {"prior": 10.0, "learning_rate": 1.0, "minibatch": 8, "steps": 1000, "pattern": "1:4"}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("spawn").Pool(
            args.processes, start, (write_texts(Path(folder)), args.device)
        ) as pool,
    ):
        rows = []
        for row in pool.imap_unordered(measure, grid()):
            rows.append(row)
            print(json.dumps(row), flush=True)
            args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def write_texts(folder: Path) -> Path:
    """Write the calibration plays for learning and the selection plays for judging to files."""
    plays = DemoPlays()
    lines = [json.dumps({"text": text}) for text in plays.texts("calibration")]
    (folder / "learn.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "judge.txt").write_text("\n\n".join(plays.texts("selection")), encoding="utf-8")
    return folder


def start(folder: Path, device: str) -> None:
    """Load model and texts once per process."""
    global experiment, text, starts
    torch.set_num_threads(1)
    text = f"text:{folder}/judge.txt"
    method = MethodSpec("maskpro", "maskpro")
    spec = RunSpec((method,), calibration=f"jsonl:{folder}/learn.jsonl", metrics=(f"ppl:{text}@256",), device=device)
    experiment = prepared(checked(spec, load_plugins()))
    starts = {}


experiment: Experiment
text: str
starts: dict[tuple[str, str], tuple[dict[str, torch.Tensor], torch.Tensor]]


def measure(setting: dict[str, Any]) -> dict[str, Any]:
    """Learn with one setting and return its gain over the initial mask."""
    pattern = Pattern.parse(setting.get("pattern", "2:4"))
    method = MaskPro(**{name: value for name, value in setting.items() if name != "pattern"})
    initial, before = initial_of(method.init, pattern)
    patterns = dict.fromkeys(experiment.bundle.layers, pattern)
    pool = experiment.pools[0]
    store = MemoryCheckpoints()
    task = LearnTask(
        experiment.bundle, experiment.dense, patterns, initial, pool.calibration, pool.selection, 0, store, "maskpro"
    )
    began = time.perf_counter()
    masks = method.learn(task)
    seconds = time.perf_counter() - began
    gained = losses_of(masks) - before
    return {
        **setting,
        "seconds": round(seconds, 1),
        "initial": round(float(before.mean()), 4),
        "nats": round(float(gained.mean()), 4),
        "stderr": round(float(gained.std() / len(gained) ** 0.5), 4),
        "groups_changed": task.notes["groups_changed"],
        "returned": task.notes["returned"],
    }


def initial_of(init: str, pattern: Pattern) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The masks of a one-shot method and their losses, computed once per pattern."""
    if (init, str(pattern)) not in starts:
        method = experiment.plugins.registries.methods.get(init)()
        patterns = dict.fromkeys(experiment.bundle.layers, pattern)
        windows = experiment.pools[0].calibration[: experiment.spec.windows]
        pruned = prune_one_shot(experiment.bundle, experiment.dense, method, patterns, windows, init).pruned
        starts[init, str(pattern)] = (pruned.masks, losses_of(pruned.masks))
    return starts[init, str(pattern)]


def losses_of(masks: Any) -> torch.Tensor:
    """Losses of the masked dense model on the selection plays, window by window."""
    apply(experiment.bundle, PrunedModel({name: Pruned(mask) for name, mask in masks.items()}))
    losses = Subject(experiment.bundle, experiment.texts).losses(text, 256)
    experiment.dense.restore()
    return losses


if __name__ == "__main__":
    main()
