"""The time of SparseGPT on one layer of a GPU, of each of its parts, and the accuracy of the fast path.

    python sparsegpt.py --json results/sparsegpt_h100.json

Layers have 4096 x 4096 and 4096 x 14336 weights (out x in), and the Gram matrix of correlated bfloat16 inputs. `old` is
the former implementation: the plain loop, with the factor by Cholesky, inverse, Cholesky, and errors spread over all
later columns. `plain` is the loop of `reference.sweep_block`, the twin of the Triton program (`program`). All parts
are timed in one process by CUDA events, medians after warm-up, with TF32 off. Masks and weights are compared with the
plain loop, and, on a few rows, with a sweep in float64 of the exact Gram matrix of the same inputs. A part that fails
is reported, and the other parts go on. Takes less than 3 minutes on an H100. `--device cpu` runs all parts on tiny
layers, the program in Triton's interpreter (TRITON_INTERPRET=1): a test of this file, not of speed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import seconds
from torch import Tensor

from nmbench import Pattern
from nmbench.calibration.gram import add_gram, by_conversion, halves_rule
from nmbench_plugins.sparsegpt import launch as kernel
from nmbench_plugins.sparsegpt.factor import damped_root, inverses
from nmbench_plugins.sparsegpt.sweep import sweep

DAMPING = 0.01
BLOCK = 128
PATTERNS = (Pattern(2, 4), Pattern(4, 8), Pattern(1, 4))
LAUNCHES = tuple(kernel.Launch(rows, warps) for rows, warps in ((32, 4), (16, 4), (32, 8), (16, 2), (8, 1)))
EXACT_ROWS = 32


@dataclass
class Bench:
    """The results, the device and the settings of timing."""

    device: torch.device
    repeats: int
    result: dict[str, Any]
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def part(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run one part and store its result or its error."""
        try:
            found = work()
        except Exception as error:  # whatever it is, device time is scarce and the other parts still count
            found = {"error": f"{type(error).__name__}: {str(error)[:500]}", "where": traceback.format_exc()[-1500:]}
        self.result.setdefault("parts", {})[name] = found
        print(json.dumps({name: {k: v for k, v in found.items() if k != "where"}}), flush=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    def milliseconds(self, run: Callable[[], Any], repeats: int | None = None, warm_up: int = 1) -> float:
        """Median milliseconds of a call; on a GPU between events."""
        return 1e3 * statistics.median(seconds(run, repeats or self.repeats, self.device, warm_up))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", action="append", help="ROWSxCOLUMNS; default 4096x4096 and 4096x14336")
    parser.add_argument("--tokens", type=int, help="of the Gram products; default 32768, on a CPU 512")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one pattern, two repeats, no search for a better launch")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    small = device.type == "cpu"
    shapes = args.shape or (["24x160"] if small else ["4096x4096", "4096x14336"])
    bench = Bench(device, 2 if args.quick else args.repeats, {"environment": environment(device), "shapes": shapes})
    print(json.dumps(bench.result["environment"]), flush=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    for shape in shapes:
        rows, columns = map(int, shape.split("x"))
        measure(bench, rows, columns, args.tokens or (512 if small else 32768), args.quick or small)
        write(args.json, bench.result)  # also what there is so far
    print("\n".join(table(bench.result["parts"])))


def write(path: Path | None, result: dict[str, Any]) -> None:
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def environment(device: torch.device) -> dict[str, Any]:
    triton = importlib.util.find_spec("triton")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "triton": __import__("triton").__version__ if triton else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def measure(bench: Bench, rows: int, columns: int, tokens: int, quick: bool) -> None:
    """Measure all parts for one shape."""
    shape = f"{rows}x{columns}"
    x = inputs(tokens, columns, bench.device)
    bench.part(f"{shape} gram", partial(gram_products, bench, x))
    exact = exact_gram(x)
    gram = exact.float()
    del x
    weight = 0.02 * torch.randn(rows, columns, device=bench.device, generator=generator(bench.device, 1))
    bench.part(f"{shape} factor", lambda: factors(bench, gram))
    for pattern in PATTERNS[: 1 if quick else None]:
        bench.part(f"{shape} {pattern}", partial(sweeps, bench, weight, gram, pattern))
        bench.part(f"{shape} {pattern} accuracy", partial(accuracy, weight[:EXACT_ROWS], exact, pattern))
    bench.part(f"{shape} parts of the sweep", lambda: inside(bench, weight, gram, PATTERNS[0]))
    if not quick:
        bench.part(f"{shape} launches", lambda: launches(bench, weight, gram))


# What is pruned


def generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def inputs(tokens: int, columns: int, device: torch.device) -> Tensor:
    """Correlated bfloat16 inputs: some common directions of falling strength, noise, and columns of different size."""
    source, rank = generator(device, 0), min(256, columns // 4)
    strength = torch.logspace(0, -1.5, rank, device=device)[:, None]
    common = strength * torch.randn(rank, columns, device=device, generator=source)
    scale = torch.randn(columns, device=device, generator=source).exp()
    scale[columns // 3] *= 30  # an outlier, as real hidden states have
    parts = [
        (
            torch.randn(len(part), rank, device=device, generator=source) @ common
            + 0.3 * torch.randn(len(part), columns, device=device, generator=source)
        )
        * scale
        for part in torch.empty(tokens, device="meta").split(4096)
    ]
    return torch.cat([part.bfloat16() for part in parts])  # [tokens, columns]


def exact_gram(x: Tensor) -> Tensor:
    """(2/8) x^T x in float64."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.split(4096):
        total.addmm_(part.double().t(), part.double())
    return total.mul_(2 / 8)


# The Gram matrix


def gram_products(bench: Bench, x: Tensor) -> dict[str, Any]:
    """TFLOP/s of x^T x, 4096 tokens at a time as in a walk: by `add_gram`, in float32, and without accumulation."""
    gram = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    parts = x.split(4096)
    operations = 2 * len(x) * x.shape[1] ** 2

    def over(add: Callable[[Tensor, Tensor], Any]) -> float:
        def run() -> None:
            for part in parts:
                add(gram, part)

        return operations / bench.milliseconds(run, repeats=3) / 1e9  # TFLOP/s

    speed = {
        "add_gram": over(add_gram),
        "float32": over(by_conversion),
        "bfloat16 product": over(lambda _, part: torch.mm(part.t(), part)),
    }
    few = x[:4096]
    exact = few.double().t() @ few.double()[:, :64]  # [columns, 64]
    size = few.double().square().sum(0).sqrt()
    errors = {}
    for name, add in (("add_gram", add_gram), ("float32", by_conversion)):
        gram.zero_()
        add(gram, few)
        errors[name] = float(((gram[:, :64] - exact) / torch.outer(size, size[:64])).abs().max())
    rule = halves_rule(x.device, x.dtype).__name__
    return {"tflops": speed, "rule": rule, "largest error over sqrt(H_ii H_jj)": errors}


# The factor


def old_factor(gram: Tensor) -> Tensor:
    """The factor U by Cholesky, inverse, Cholesky, as in the former implementation."""
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    lower, failed = torch.linalg.cholesky_ex(damped)
    upper, also_failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    assert not failed and not also_failed
    return upper


def new_factor(gram: Tensor) -> Tensor:
    return damped_root(gram, gram.diagonal() == 0, DAMPING)[0]


def factors(bench: Bench, gram: Tensor) -> dict[str, Any]:
    old = bench.milliseconds(lambda: old_factor(gram), repeats=3)
    new = bench.milliseconds(lambda: new_factor(gram), repeats=3)
    return {"old ms": old, "new ms": new, "times old": old / new}


# The sweep


def old_sweep(weight: Tensor, factor: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The loop over columns of the former implementation, with the factor U."""
    weight = weight.clone()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    diagonal = factor.diagonal()
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        errors = torch.zeros_like(weight[:, start:stop])
        for column in range(start, stop):
            if column % pattern.group == 0:
                group = slice(column, column + pattern.group)
                mask[:, group] = pattern.top(weight[:, group].square() / diagonal[group].square())
            kept = weight[:, column].masked_fill(~mask[:, column], 0.0)
            errors[:, column - start] = (weight[:, column] - kept) / diagonal[column]
            weight[:, column] = kept
            rest = slice(column + 1, stop)
            weight[:, rest] -= torch.outer(errors[:, column - start], factor[column, rest])
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return mask, weight


def sweeps(bench: Bench, weight: Tensor, gram: Tensor, pattern: Pattern) -> dict[str, Any]:
    """Times of the sweep, and of factor and sweep together."""
    root, factor = new_factor(gram), old_factor(gram)
    slow = 1 if weight.shape[1] > 8192 else 2
    times = {
        "program": bench.milliseconds(lambda: sweep(weight, root, pattern, BLOCK, kernel.sweep_block), warm_up=2),
        "plain": bench.milliseconds(lambda: sweep(weight, root, pattern, BLOCK), repeats=slow),
        "old": bench.milliseconds(lambda: old_sweep(weight, factor, pattern), repeats=slow),
        "whole, program": bench.milliseconds(
            lambda: sweep(weight, new_factor(gram), pattern, BLOCK, kernel.sweep_block), repeats=3
        ),
        "whole, old": bench.milliseconds(lambda: old_sweep(weight, old_factor(gram), pattern), repeats=1, warm_up=0),
    }
    mask, repaired = sweep(weight, root, pattern, BLOCK, kernel.sweep_block)
    assert bool((pattern.kept(mask) == pattern.keep).all()), "not strict"
    ratios = {"plain / program": times["plain"] / times["program"], "old / program": times["old"] / times["program"]}
    ratios["whole, old / program"] = times["whole, old"] / times["whole, program"]
    against = {
        "plain": differences(mask, repaired, *sweep(weight, root, pattern, BLOCK)),
        "old": differences(mask, repaired, *old_sweep(weight, factor, pattern)),
    }
    return {"ms": times, "ratios": ratios, "program against": against}


def differences(mask: Tensor, weight: Tensor, other_mask: Tensor, other_weight: Tensor) -> dict[str, float]:
    """The differences of two results; those of weights relative to their root mean square, in rows with equal masks."""
    same = (mask == other_mask).all(dim=1)
    apart = (weight[same].double() - other_weight[same].double()).abs()
    rms = float(other_weight.double().square().mean().sqrt())
    return {
        "equal mask entries": float((mask == other_mask).double().mean()),
        "rows with equal masks": float(same.double().mean()),
        "largest weight difference": float(apart.max()) / rms if apart.numel() else float("nan"),
    }


def accuracy(weight: Tensor, exact: Tensor, pattern: Pattern) -> dict[str, Any]:
    """The accuracy of program, plain loop and old loop against a sweep in float64, on a few rows.

    A near-tie that rounding decides changes the rest of a row, so that the layer error of the result relative to that
    of the exact sweep is measured as well.
    """
    gram = exact.float()
    root = new_factor(exact)
    truth = sweep(weight.double(), root, pattern, BLOCK)
    found = {
        "program": sweep(weight, new_factor(gram), pattern, BLOCK, kernel.sweep_block),
        "plain": sweep(weight, new_factor(gram), pattern, BLOCK),
        "old": old_sweep(weight, old_factor(gram), pattern),
    }

    def loss(repaired: Tensor) -> float:
        return float(((repaired.double() - weight.double()) @ root).square().sum())

    return {
        name: {**differences(*result, *truth), "layer error over exact": loss(result[1]) / loss(truth[1])}
        for name, result in found.items()
    }


def inside(bench: Bench, weight: Tensor, gram: Tensor, pattern: Pattern) -> dict[str, Any]:
    """Times of the parts of a sweep: all programs, the inverses of blocks, all matrix products."""
    root = new_factor(gram)
    columns = weight.shape[1]
    spreads, pivots = inverses(root, BLOCK), root.diagonal().contiguous()
    mask, work = torch.zeros_like(weight, dtype=torch.bool), weight.clone()
    pull = torch.zeros_like(weight)
    blocks = [slice(start, min(start + BLOCK, columns)) for start in range(0, columns, BLOCK)]

    def programs() -> None:
        for block, spread in zip(blocks, spreads, strict=True):
            size = block.stop - block.start
            kernel.sweep_block(work[:, block], mask[:, block], spread[:size, :size], pivots[block], pattern)

    def products() -> None:
        for block in blocks:
            pull[:, block.stop :].addmm_(weight[:, block], root[block, block.stop :])

    times = {
        "programs": bench.milliseconds(programs),
        "inverses": bench.milliseconds(lambda: inverses(root, BLOCK)),
        "products": bench.milliseconds(products),
    }
    operations = sum(2 * weight.shape[0] * BLOCK * (columns - block.stop) for block in blocks)
    return {"ms": times, "products, TFLOP/s": operations / times["products"] / 1e9}


def launches(bench: Bench, weight: Tensor, gram: Tensor) -> dict[str, Any]:
    """Milliseconds of other launch sizes of the program, for all blocks of each pattern."""
    block = slice(0, BLOCK)
    root = new_factor(gram[block, block].contiguous())
    spread, pivots = inverses(root, BLOCK)[0], root.diagonal().contiguous()
    mask, work = torch.zeros_like(weight[:, block], dtype=torch.bool), weight[:, block].contiguous()
    count = weight.shape[1] // BLOCK
    found: dict[str, Any] = {}
    pattern = PATTERNS[0]
    for launch in LAUNCHES:
        name = f"{pattern}, {launch.rows} rows, {launch.warps} warps"
        try:
            run = partial(kernel.sweep_block, work, mask, spread, pivots, pattern, launch)
            found[name] = count * bench.milliseconds(run, repeats=30, warm_up=3)
        except Exception as error:  # one that this device cannot have
            found[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return found


# The table


def table(parts: dict[str, dict[str, Any]]) -> list[str]:
    """The times of the sweeps as a Markdown table."""
    lines = ["| layer | program ms | plain ms | old ms | plain / program | old / program | whole ms | old whole ms | |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for name, found in parts.items():
        if "ratios" not in found:
            continue
        ms, ratios = found["ms"], found["ratios"]
        cells = [ms["program"], ms["plain"], ms["old"], *list(ratios.values())[:2], ms["whole, program"]]
        cells += [ms["whole, old"], ratios["whole, old / program"]]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
    lines += ["", "| inputs | add_gram TFLOP/s | float32 | bfloat16 product |", "|---|---|---|---|"]
    lines += [
        f"| {name} | " + " | ".join(f"{value:.0f}" for value in found["tflops"].values()) + " |"
        for name, found in parts.items()
        if "tflops" in found
    ]
    failed = [f"FAILED {name}: {found['error']}" for name, found in parts.items() if "error" in found]
    return lines + failed


if __name__ == "__main__":
    main()
