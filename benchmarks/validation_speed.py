"""The speed and memory of `nmbench validate` on synthetic 2:4 checkpoints and masks of every format: GB/s, bytes.

    python validation_speed.py --folder SCRATCH --json results/validation_speed.json

Writes about 3 GB into SCRATCH and removes the files again. Every file is read several times; the first pass loads the
file into the page cache, so that the processor is measured and not the disk. Every format is validated in a process of
its own. On a shared machine, compare GB per second of processor time rather than per second of wall-clock time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from nmbench.artifacts.reading import open_artifact
from nmbench.artifacts.validation import validate
from nmbench.experiment.environment import cpu_name
from nmbench.pattern import Pattern
from nmbench.results.files import save_masks

PATTERN = Pattern(2, 4)
SIZE, LAYERS, REPEATS = 4096, 32, 5
FORMATS = ("safetensors bfloat16", "safetensors float32", "torch bfloat16", "packed masks", "npz masks", "bool masks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measured(args.measure)))
        return
    rows = []
    for form in FORMATS:
        path = write(args.folder, form)
        command = [sys.executable, __file__, "--folder", str(args.folder), "--measure", str(path)]
        rows.append({"format": form, **json.loads(subprocess.run(command, capture_output=True, check=True).stdout)})
        print(line(rows[-1]), flush=True)
        shutil.rmtree(args.folder)
    content = {"copy_gb_per_second": copy_speed(), "processor": cpu_name(), "torch": torch.__version__, "rows": rows}
    print(f"copying in memory, one thread: {content['copy_gb_per_second']:.1f} GB/s; {content['processor']}")
    if args.json:
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['format']:<21} {row['gb']:.3f} GB {row['gb_per_second']:6.2f} GB/s ({row['slowest']:.2f} to "
        f"{row['fastest']:.2f}; {row['gb_per_processor_second']:.2f} a processor second), "
        f"{row['gigaweights_per_second']:.2f} G weights/s, {row['private_mib']:.0f} MiB"
    )


def write(folder: Path, form: str) -> Path:
    """A file of one format with layers of 4096 x 4096, half of them for float32."""
    folder.mkdir(parents=True, exist_ok=True)
    kind, _, dtype = form.partition(" ")
    layers = LAYERS // 2 if dtype == "float32" else LAYERS
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, SIZE, generator=generator)
    mask = PATTERN.top(weight.abs())
    names = [f"model.layers.{index}.mlp.up_proj" for index in range(layers)]
    if dtype == "masks":
        return write_masks(folder, kind, mask, names)
    chosen = weight.masked_fill(~mask, 0.0).to(getattr(torch, dtype))
    tensors = {f"{name}.weight": chosen.clone() for name in names}
    path = folder / f"model.{'bin' if kind == 'torch' else 'safetensors'}"
    if kind == "torch":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path)
    return path


def write_masks(folder: Path, kind: str, mask: Tensor, names: list[str]) -> Path:
    path = folder / f"masks.{'npz' if kind == 'npz' else 'safetensors'}"
    if kind == "packed":
        save_masks(path, dict.fromkeys(names, mask), dict.fromkeys(names, PATTERN), {})
    elif kind == "npz":
        np.savez_compressed(path, **{f"{name}.weight.mask": np.packbits(mask.numpy()) for name in names})
    else:
        safetensors.torch.save_file({f"{name}.weight.mask": mask.clone() for name in names}, path)
    return path


def measured(path: Path) -> dict[str, Any]:
    """The speed of several passes, and the peak of private memory over that before the first pass."""
    start = private_bytes()
    seen = [start]
    threading.Thread(target=watch, args=(seen,), daemon=True).start()
    speeds, busy = [], []
    for number in range(REPEATS + 1):
        before, worked = time.perf_counter(), time.thread_time()
        found = validate(open_artifact(str(path)))
        seconds, work = time.perf_counter() - before, time.thread_time() - worked
        assert found.strict
        speeds += [found.bytes / 1e9 / seconds] if number else []
        busy += [found.bytes / 1e9 / work] if number else []
    weights = sum(layer.weights for layer in found.layers)
    middle = statistics.median(speeds)
    return {
        "gb": found.bytes / 1e9,
        "gb_per_second": middle,
        "slowest": min(speeds),
        "fastest": max(speeds),
        "gb_per_processor_second": statistics.median(busy),
        "gigaweights_per_second": weights / 1e9 * middle / (found.bytes / 1e9),
        "private_mib": (max(seen) - start) / 2**20,
        "passes": REPEATS,
        "threads": torch.get_num_threads(),
    }


def watch(seen: list[int]) -> None:
    while True:
        seen.append(private_bytes())
        time.sleep(0.005)


def private_bytes() -> int:
    """Bytes of private memory of the process, without pages of mapped files, which the system can reclaim."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(text.split()[1]) for text in lines if text.startswith("RssAnon")) * 1024


def copy_speed() -> float:
    """GB/s of copying half a gigabyte, counted once, the best of five."""
    source = np.ones(2**29, np.uint8)
    target = np.empty_like(source)
    times = []
    for _ in range(5):
        before = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - before)
    return source.nbytes / 1e9 / min(times)


if __name__ == "__main__":
    main()
