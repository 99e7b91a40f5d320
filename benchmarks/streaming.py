"""The Wanda walk with the model on the device, streamed from host memory, and streamed from disk, side by side.

    python streaming.py                                          8 of the 32 blocks of the shape of Llama 3.1 8B
    python streaming.py --blocks 32                              all of them: 40 GiB of disk while it runs
    python streaming.py --shape llama-3.1-70b --blocks 4         4 of 80 blocks
    python streaming.py --shape tiny --device cpu --windows 4 --window-tokens 32 --test-windows 2   a trial, in a minute

A random model is written to `--folder`, block by block, and removed at the end. Every mode runs in a process of its
own: it loads the folder, walks `--repeats` times after one walk of warm-up, applies the masks, and measures the losses
of the test windows. Before each walk of the mode `disk, cold` the files are dropped from the page cache; in the mode
`disk` they may be there. In the mode `host, passes too` the hidden states of all windows wait on the host, as they do
where the device has no room for them.

`ratio`: seconds of a walk over those of the resident model. `overlap`: the share of the seconds of reading during which
another block was at work, so that nothing waited. `device` and `host`: the most that torch allocated on the GPU, and
the growth of the resident memory of the process since before loading, beside what nmbench estimates. The estimate of
the time: for each block, the seconds of reading it or of walking through it, whichever is more, and the seconds of
reading the first; the rate of reading is that of one file, and the seconds of walking those of the resident model of
two blocks. All must be within the estimate + 20 %; the last columns are measured / estimated.

It takes minutes: more than 150 s on a GPU host with `--blocks 4 --windows 48 --repeats 1`, and more in proportion to
blocks x windows x (repeats + 1) of every mode. A mode is printed and stored in `--json` when it is done, so that what
ends early keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import transformers
from safetensors.torch import save_file
from shapes import SHAPES

from nmbench import Pattern, load_plugins
from nmbench.evaluation.losses import window_losses
from nmbench.experiment.environment import cpu_name
from nmbench.experiment.loading import load_model
from nmbench.experiment.measurement import in_parts
from nmbench.experiment.memory import planned
from nmbench.experiment.whereabouts import whereabouts
from nmbench.models.applying import apply
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.pruning.one_shot import prune_one_shot
from nmbench.runtime.cost import Meter
from nmbench.spec import MethodSpec, RunSpec
from nmbench_plugins.tiny import byte_tokenizer
from nmbench_plugins.wanda import Wanda

MODES = ("resident", "host", "host, passes too", "disk", "disk, cold")
SOURCES = {"resident": None, "host": "host", "host, passes too": "host", "disk": "disk", "disk, cold": "disk"}
PILOT = 2  # blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--window-tokens", type=int, default=2048)
    parser.add_argument("--test-windows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--folder", type=Path, help="on the disk to measure  [a temporary one]")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measured(args)))
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Measure every mode in a process of its own; print a row and write the JSON after each."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # which removes the folder
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="nmbench-streaming-") as folder:
        began = time.perf_counter()
        whole, pilot = Path(folder, "whole"), Path(folder, "pilot")
        block_bytes = write_model(args.shape, args.blocks, whole, args.device)
        write_model(args.shape, PILOT, pilot, args.device)
        print(f"written in {time.perf_counter() - began:.0f} s; a block has {block_bytes / 2**30:.2f} GiB", flush=True)
        per_block = child(args, "resident", pilot)["walk_seconds"] / PILOT
        rate = reading_rate(whole / "block-0.safetensors")
        read = block_bytes / rate
        expected = args.blocks * max(per_block, read) + read
        print(
            f"one block: {per_block:.3f} s of walking, {read:.3f} s of reading ({rate / 2**30:.2f} GiB/s)", flush=True
        )
        print(
            "| mode | walk, s | ratio | overlap | losses, s | device, GiB | / est. | host, GiB | / est. | time / est. |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
        content = {
            **{name: getattr(args, name) for name in ("shape", "blocks", "windows", "window_tokens", "test_windows")},
            **{"of_blocks": SHAPES[args.shape].blocks, "block_bytes": block_bytes, "dtype": "bfloat16"},
            **{"read_bytes_per_second": rate, "walk_seconds_per_block": per_block, "expected_seconds": expected},
            "device": torch.cuda.get_device_name() if args.device == "cuda" else cpu_name(),
            **{"torch": torch.__version__, "transformers": transformers.__version__},
        }
        rows: list[dict[str, Any]] = []
        for mode in args.modes:
            rows = compared([*rows, child(args, mode, whole)], expected)
            print(line(rows[-1]), flush=True)
            if args.json:
                args.json.write_text(json.dumps({**content, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def compared(rows: list[dict[str, Any]], expected: float) -> list[dict[str, Any]]:
    """Rows with their ratios to the resident model, if it is there, and of those from disk to the expected seconds."""
    resident = next((row["walk_seconds"] for row in rows if row["mode"] == "resident"), None)
    return [
        {
            **row,
            "ratio": row["walk_seconds"] / resident if resident else None,
            "of_time": row["walk_seconds"] / expected if SOURCES[row["mode"]] == "disk" else None,
        }
        for row in rows
    ]


def line(row: dict[str, Any]) -> str:
    """A row of the table."""

    def shown(value: float | None, form: str = ".2f") -> str:
        return "-" if value is None else f"{value:{form}}"

    gib = {name: None if row[name] is None else row[name] / 2**30 for name in ("device_bytes", "host_bytes")}
    device = row["device_bytes"] and row["device_bytes"] / row["device_estimate"]
    cells = [row["mode"], shown(row["walk_seconds"], ".3f"), shown(row["ratio"]), shown(row["overlap"])]
    cells += [shown(row["losses_seconds"]), shown(gib["device_bytes"]), shown(device), shown(gib["host_bytes"])]
    return f"| {' | '.join([*cells, shown(row['host_bytes'] / row['host_estimate']), shown(row['of_time'])])} |"


def write_model(name: str, blocks: int, folder: Path, device: str) -> int:
    """Write a random model in bfloat16, one file for a block and one for the rest; return the bytes of a block."""
    config = SHAPES[name].config(blocks, SHAPES[name].vocabulary if name != "tiny" else 257)
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    parts: dict[str, list[str]] = {}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for parameter in shapes:
        number = parameter.split(".")[2] if parameter.startswith("model.layers.") else ""
        parts.setdefault(f"block-{number}" if number else "outside", []).append(parameter)
    folder.mkdir()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    for part, names in parts.items():
        tensors = {}
        for parameter in names:
            tensor = torch.empty(shapes[parameter], dtype=torch.bfloat16, device=device)
            tensors[parameter] = (tensor.fill_(1) if tensor.dim() == 1 else tensor.normal_(0, 0.02)).cpu()
        save_file(tensors, folder / f"{part}.safetensors", {"format": "pt"})
    weight_map = {parameter: f"{part}.safetensors" for part, names in parts.items() for parameter in names}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    os.sync()
    return (folder / "block-0.safetensors").stat().st_size


def forget(files: Iterator[Path] | list[Path]) -> None:
    """Drop files from the page cache."""
    for path in files:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def reading_rate(path: Path) -> float:
    """Return the bytes a second of reading a file that is not in the page cache."""
    forget([path])
    buffer, size = bytearray(2**24), 0
    began = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            size += count
    return size / (time.perf_counter() - began)


def child(args: argparse.Namespace, mode: str, folder: Path) -> dict[str, Any]:
    """The figures of one mode, measured in a process of its own."""
    names = ("windows", "window_tokens", "test_windows", "repeats", "device")
    flags = [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    command = [sys.executable, __file__, *flags, "--measure", mode, "--folder", str(folder)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"the mode {mode} has failed")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Load the model in `args.folder`, walk, and measure losses; return seconds, peaks and estimates in bytes."""
    mode, device, source = args.measure, torch.device(args.device), SOURCES[args.measure]
    plugins = load_plugins()
    if device.type == "cuda":
        ones = torch.ones(64, 64, device=device, dtype=torch.bfloat16)
        (ones @ ones).sort()  # libraries, which are no part of the growth, come into memory
    before = psutil.Process().memory_info().rss

    def place(bundle: Bundle, device: torch.device) -> None:
        bundle.stream(device, source == "disk") if source else bundle.to(device)
        if bundle.streaming and mode == "host, passes too":
            bundle.streaming.room = 0

    with Meter(device) as meter:
        began = time.perf_counter()
        bundle = load_model(str(args.folder), plugins, dtype="bfloat16", device=args.device, place=place)
        dense = DenseWeights(bundle)
        loaded = time.perf_counter() - began
        times, overlaps, losses = worked(args, bundle, dense, cold=mode == "disk, cold")
    spec = RunSpec(
        (MethodSpec("wanda", "wanda", {}),),
        str(args.folder),
        windows=args.windows,
        window_tokens=args.window_tokens,
        dtype="bfloat16",
        metrics=("ppl:demo@64",),
        calibration="demo",
    ).resolved(bundle.defaults)
    there = whereabouts(bundle, spec, [Wanda()], device, source)
    return {
        **{"mode": mode, "load_seconds": loaded, "walk_seconds": median(times), "walks": times},
        **{"overlap": median(overlaps) if overlaps else None, "losses_seconds": losses},
        **{"device_bytes": meter.device_bytes, "host_bytes": max(meter.host_bytes - before, 1)},
        "device_estimate": planned(bundle, spec, [Wanda()], device, source is not None).peak,
        "host_estimate": sum(there.host.values()) + sum(there.device.values()) * (device.type == "cpu"),
    }


@torch.no_grad()
def worked(
    args: argparse.Namespace, bundle: Bundle, dense: DenseWeights, cold: bool
) -> tuple[list[float], list[float], float]:
    """Return the seconds of the walks and their overlaps, and the seconds of the losses of the pruned model."""
    vocabulary = bundle.model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(vocabulary, (args.windows, args.window_tokens), generator=generator)
    patterns, times, overlaps = dict.fromkeys(bundle.layers, Pattern(2, 4)), [], []
    for turn in range(args.repeats + 1):
        if cold:
            forget(args.folder.glob("*.safetensors"))
        seconds, pruned = timed(bundle, lambda: prune_one_shot(bundle, dense, Wanda(), patterns, windows, "it").pruned)
        traffic = bundle.streaming.traffic() if bundle.streaming else None
        if turn:
            times.append(seconds)
            overlaps += [traffic.overlap] if traffic else []
    apply(bundle, pruned)
    tests = windows[: args.test_windows]
    measure = lambda part: window_losses(bundle.model, part.to(bundle.device))  # noqa: E731
    seconds, _ = timed(bundle, lambda: in_parts(bundle)(measure, tests, 1, lambda done, total: None).cpu())
    dense.restore()
    return times, overlaps, seconds


def timed(bundle: Bundle, work: Any) -> tuple[float, Any]:
    """Return the seconds of work, to its end on the device, and its result."""
    synchronize = torch.cuda.synchronize if bundle.device.type == "cuda" else lambda: None
    synchronize()
    began = time.perf_counter()
    found = work()
    synchronize()
    return time.perf_counter() - began, found


if __name__ == "__main__":
    main()
