"""The speed of the fused MaskPro step against plain torch calls, against torch.compile, and against copying memory.

    python maskpro_kernel.py --json results/maskpro_kernel_h100.json

One layer of 32768 x 8192 weights by default. First every program is compared with its reference in plain torch (float64
gradients), then all are timed in this process by CUDA events, the median of 20 runs after warm-up. Bytes are those that
must move: logits read and written, weights read, masked weights written. Takes less than 80 s on an H100. With
`--device cpu` the reference replaces the programs, on a tiny layer: a test of this file, not of speed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timing import seconds
from torch import Tensor

from nmbench_plugins.maskpro.kernels import launch as kernels
from nmbench_plugins.maskpro.kernels import reference as plain_kernels

SEED = 2**40 + 7
WARM_UPS = 3
SCALE = 1e-3  # of the updates: logits stay what they are
LAUNCHES = (
    *(kernels.Launch(128, 4, registers) for registers in (None, 40, 48, 56, 64, 80)),
    kernels.Launch(32, 1, 48),
    kernels.Launch(64, 2, 48),
    kernels.Launch(256, 8, 48),
    kernels.Launch(512, 16, 64),
    kernels.Launch(256, 4, None),
    kernels.Launch(256, 4, 80),
)


@dataclass(frozen=True)
class Variant:
    """The arguments of one call of the launchers."""

    name: str
    keep: int = 2
    group: int = 4
    update: bool = True
    draw: bool = True
    logits: torch.dtype = torch.float32
    weight: torch.dtype = torch.bfloat16

    @property
    def bytes_per_weight(self) -> int:
        """Bytes per weight that a perfect cache would move."""
        drawn = 2 * self.weight.itemsize if self.draw else 0
        return self.logits.itemsize * (1 + self.update) + drawn


VARIANTS = (
    Variant("2:4"),
    Variant("2:4, draw only", update=False),
    Variant("2:4, update only", draw=False),
    Variant("2:4, float16 logits", logits=torch.float16),
    Variant("2:4, float32 weights", weight=torch.float32),
    Variant("1:4", keep=1),
    Variant("4:8", keep=4, group=8),
)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    milliseconds: float
    spread: float  # (third quartile - first quartile) / median
    gigabytes_per_second: float
    of_copy: float
    masks_per_second: float
    extra_bytes: int  # at the peak, beyond logits, weights and masked weights
    times_plain: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, help="default 32768, on a CPU 64")
    parser.add_argument("--columns", type=int, help="default 8192, on a CPU 256")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--sweep", action="store_true", help="time other sizes of block as well")
    parser.add_argument("--skip-plain", action="store_true", help="leave out the plain torch calls")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    shape = (
        args.rows or (64 if device.type == "cpu" else 32768),
        args.columns or (256 if device.type == "cpu" else 8192),
    )
    result: dict[str, Any] = {"environment": environment(device), "shape": shape, "repeats": args.repeats}
    print(json.dumps(result["environment"]))
    if device.type == "cuda":
        result["checks"] = [report(check(variant)) for variant in VARIANTS] + [
            report(check_greedy()),
            report(check_graph()),
        ]
    rows = timings(shape, device, args.repeats, not args.skip_plain)
    result["rows"] = [asdict(row) for row in rows]
    if args.sweep and device.type == "cuda":
        result["sweep"] = sweep(shape, args.repeats)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def environment(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    triton = importlib.util.find_spec("triton")
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": __import__("triton").__version__ if triton else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def report(line: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps(line), flush=True)
    return line


# Correctness


def check(variant: Variant, shape: tuple[int, int] = (256, 8192)) -> dict[str, Any]:
    """Compare two steps of a program and of its reference; masks may differ where rounding decides a draw."""
    generator = torch.Generator().manual_seed(0)
    logits, weight, out, scale = tensors(variant, shape, torch.device("cpu"), generator)
    scale = torch.rand(scale.shape, generator=generator)
    theirs = [tensor.cuda() for tensor in (logits, weight, out, scale)]
    step = torch.tensor([1])
    error, differ = 0.0, 0
    for turn in (1, 2):
        step.fill_(turn)
        out.fill_(float("nan"))  # poison
        theirs[2].fill_(float("nan"))
        logits.copy_(theirs[0])  # the same start: rounding does not add up
        call(variant, *theirs, step.cuda())
        call(dataclasses.replace(variant, draw=False), logits, weight, out, scale, step, reference=True)
        error = max(error, float((logits.float() - theirs[0].cpu().float()).abs().max()))
        logits.copy_(theirs[0])  # where logits nearly tie the last bit decides
        call(dataclasses.replace(variant, update=False), logits, weight, out, scale, step, reference=True)
        if variant.draw:
            differ += int((out != theirs[2].cpu()).view(-1, variant.group).any(-1).sum())
    groups = logits.numel() // variant.group
    tolerance = 4e-5 if variant.logits == torch.float32 else 0.02  # another rounding of a float16 at random
    line = {"check": variant.name, "largest_error": error, "groups": groups, "masks_that_differ": differ}
    assert error <= tolerance and differ <= 2e-5 * groups, line  # in two draws
    return line


def check_greedy() -> dict[str, Any]:
    """Compare the masks of the largest logits, among many ties."""
    logits = torch.randint(0, 5, (256, 8192), generator=torch.Generator().manual_seed(0)).float()
    weight = torch.randn(logits.shape).bfloat16()
    wrong = 0
    for keep, group in sorted(kernels.FUSED):
        expected = torch.empty_like(weight)
        out = torch.full_like(weight, float("nan")).cuda()
        plain_kernels.greedy(logits, weight, expected, keep, group)
        kernels.greedy(logits.cuda(), weight.cuda(), out, keep, group)
        wrong += int((out.cpu() != expected).sum())
    assert not wrong, wrong
    return {"check": "greedy", "wrong": wrong}


def check_graph() -> dict[str, Any]:
    """Check that a captured step replays with the step number on the device."""
    generator = torch.Generator("cuda").manual_seed(0)
    variant = VARIANTS[0]
    logits, weight, out, scale = tensors(variant, (256, 8192), torch.device("cuda"), generator)
    start, expected, step = logits.clone(), torch.empty_like(out), torch.zeros(1, dtype=torch.int64, device="cuda")
    call(variant, logits, weight, out, scale, step)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.add_(1)
        call(variant, logits, weight, out, scale, step)
    logits.copy_(start)
    step.zero_()
    by_hand = start.clone()
    for turn in range(1, 4):
        graph.replay()
        call(variant, by_hand, weight, expected, scale, step.clone().fill_(turn))
        assert torch.equal(out, expected) and torch.equal(logits, by_hand), turn
    return {"check": "cuda graph", "replays": turn}


def tensors(
    variant: Variant, shape: tuple[int, int], device: torch.device, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, weight, buffer of the masked weights, scale."""
    logits = torch.randn(shape, device=device, generator=generator).mul_(3).to(variant.logits)
    weight = torch.randn(shape, device=device, generator=generator, dtype=variant.weight)
    return logits, weight, torch.empty_like(weight), torch.full((1,), SCALE, device=device)


def call(
    variant: Variant,
    logits: Tensor,
    weight: Tensor,
    out: Tensor,
    scale: Tensor,
    step: Tensor,
    reference: bool = False,
    launch: kernels.Launch | None = None,
) -> None:
    """One step of a variant, by the program or by its reference."""
    same = {
        "seed": SEED,
        "first_group": 11,
        "step": step,
        "scale": scale,
        "update": variant.update,
        "draw": variant.draw,
    }
    where = (logits, weight, out, variant.keep, variant.group)
    if reference:
        plain_kernels.step(*where, **same)
    else:
        same["launch"] = launch
        kernels.step(*where, **same)


# Speed


def timings(shape: tuple[int, int], device: torch.device, repeats: int, with_plain: bool) -> list[Row]:
    """Time every variant; print the table line by line."""
    bandwidth = copy_bandwidth(device, repeats)
    print(f"copy: {bandwidth / 1e9:.0f} GB/s, bytes read and bytes written")
    print(f"{'':38}{'ms':>9}{'spread':>8}{'GB/s':>8}{'of copy':>9}{'x plain':>9}{'masks/s':>10}{'extra GB':>10}")
    plain: list[Row] = plain_timings(shape, device, repeats, bandwidth) if with_plain else []
    reference = plain[0].milliseconds if plain else None
    rows = list(plain)
    for variant in VARIANTS:
        data = tensors(variant, shape, device, torch.Generator(device).manual_seed(0))
        step = torch.ones(1, dtype=torch.int64, device=device)
        run = functools.partial(call, variant, *data, step, reference=device.type == "cpu")
        size = variant.bytes_per_weight * data[0].numel()
        name = f"{'reference' if device.type == 'cpu' else 'fused'} {variant.name}"
        rows.append(row(name, run, size, repeats, device, bandwidth, reference))
        del run, data
    rows.append(greedy_timing(shape, device, repeats, bandwidth))
    return rows


def greedy_timing(shape: tuple[int, int], device: torch.device, repeats: int, bandwidth: float) -> Row:
    logits, weight, out, _ = tensors(VARIANTS[0], shape, device, torch.Generator(device).manual_seed(0))
    greedy = plain_kernels.greedy if device.type == "cpu" else kernels.greedy
    return row("greedy 2:4", lambda: greedy(logits, weight, out, 2, 4), 8 * logits.numel(), repeats, device, bandwidth)


def plain_timings(shape: tuple[int, int], device: torch.device, repeats: int, bandwidth: float) -> list[Row]:
    """Times of the plain torch calls, eager and compiled."""
    logits, weight, out, _ = tensors(VARIANTS[0], shape, device, torch.Generator(device).manual_seed(0))
    logits.div_(6)  # the textbook gradient divides by 1 - p, which is 0 in float32 for gaps over 17
    size = VARIANTS[0].bytes_per_weight * logits.numel()
    rows = [row("plain torch 2:4", lambda: plain_step(logits, weight, out), size, repeats, device, bandwidth)]
    if device.type == "cpu":
        return rows
    compiled = torch.compile(plain_step)
    try:
        compiled(logits, weight, out)
    except Exception as error:  # whatever the compiler trips over on this machine: the other rows still count
        print(f"torch.compile failed: {type(error).__name__}: {str(error)[:300]}")
        return rows
    name = "torch.compile of the same"
    run = functools.partial(compiled, logits, weight, out)
    return [*rows, row(name, run, size, repeats, device, bandwidth, rows[0].milliseconds)]


def plain_step(logits: Tensor, weight: Tensor, out: Tensor) -> None:
    """Draw two of four, mask the weights, update the logits, with the textbook gradient and no needless copy."""
    rows = logits.view(-1, 4)  # [groups, 4]
    kept = torch.multinomial(rows.softmax(-1), 2)  # [groups, 2]
    mask = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, kept, True)
    torch.mul(weight.view(-1, 4), mask, out=out.view(-1, 4))
    p = rows.softmax(-1)
    q = 1 - p
    share = mask / q
    share = share / share.sum(-1, keepdim=True)
    second = share * p / q
    rows.add_(second - p * (2 + second.sum(-1, keepdim=True)) + mask, alpha=SCALE)


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes read plus bytes written per second of a large copy on the device."""
    source = torch.ones(2**31 if device.type == "cuda" else 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = seconds(lambda: target.copy_(source), repeats, device, WARM_UPS)
    return 2 * source.numel() / statistics.median(times)


def row(
    name: str,
    run: Callable[[], Any],
    size: int,
    repeats: int,
    device: torch.device,
    bandwidth: float,
    plain: float | None = None,
) -> Row:
    """Time, print and return one line; `size`: the bytes that must move; `plain`: milliseconds to compare with."""
    extra = extra_bytes(run, device)
    times = seconds(run, repeats, device, WARM_UPS)
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4)
    speed = size / median
    result = Row(
        name,
        median * 1e3,
        (high - low) / median,
        speed / 1e9,
        speed / bandwidth,
        1 / median,
        extra,
        plain / (median * 1e3) if plain else None,
    )
    print(
        f"{name:38}{result.milliseconds:9.3f}{result.spread:8.1%}{result.gigabytes_per_second:8.0f}{result.of_copy:9.1%}"
        f"{result.times_plain or math.nan:9.1f}{result.masks_per_second:10.1f}{extra / 1e9:10.2f}",
        flush=True,
    )
    return result


def extra_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Peak device memory of a run in bytes, less the memory allocated before. The run is a warm-up too."""
    if device.type != "cuda":
        return 0
    run()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def sweep(shape: tuple[int, int], repeats: int) -> list[dict[str, Any]]:
    """Times of a 2:4 step with other block sizes."""
    lines = []
    device, variant = torch.device("cuda"), VARIANTS[0]
    data = tensors(variant, shape, device, torch.Generator(device).manual_seed(0))
    step = torch.ones(1, dtype=torch.int64, device=device)
    for launch in LAUNCHES:
        run = functools.partial(call, variant, *data, step, launch=launch)
        median = statistics.median(seconds(run, repeats, device, WARM_UPS))
        lines.append(report({"sweep": variant.name, **asdict(launch), "milliseconds": round(median * 1e3, 4)}))
    return lines


if __name__ == "__main__":
    main()
