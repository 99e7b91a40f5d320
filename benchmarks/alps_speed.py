"""The time of ALPS on one layer beside its plain loop, of each part, and its layer error beside SparseGPT's.

    python alps_speed.py --json results/alps_speed_h100.json
    python alps_speed.py --model FOLDER --calibration text:FILE --layers 12 --json results/alps_layers.json

Layers have 4096 x 4096 and 4096 x 14336 weights (out x in), and the Gram matrix of correlated inputs of different size.
`plain` is the loop of the paper, `tests/reference/alps.py`: eigenvectors in float64, the inverse made of them at every
change of the penalty, a sort as the projection. `plain, fast projection` is the same with `Pattern.top`. All are timed
in one process by CUDA events, medians after warm-up, with TF32 off. `parts` are the milliseconds of one factorisation
and of one iteration, and of the choices not taken: eigenvectors in float64 and float32, a Cholesky factor in float64,
and triangular solves in place of the inverse. A part that fails is reported, and the others go on.

With `--model`, the layers of that model, as many as asked and evenly spread, are pruned on the inputs of the dense
model: the squared error of the outputs relative to the dense outputs, by ALPS and by SparseGPT, and on how many layers
ALPS is lower. `--device cpu` runs tiny layers, and the demo with `--model demo`: a test of this file, not of speed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import seconds
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from nmbench import LayerStats, Pattern, RunSpec, Stat, load_plugins
from nmbench.calibration import full_float32, walk
from nmbench.experiment.environment import cpu_name
from nmbench.experiment.plan import checked
from nmbench.experiment.setup import prepared
from nmbench_plugins.alps import ALPS
from nmbench_plugins.alps.admm import search
from nmbench_plugins.alps.problem import Problem
from nmbench_plugins.sparsegpt import SparseGPT
from reference import alps as plain

PENALTY = 0.1


def milliseconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median milliseconds of a call after one that is not counted; on a GPU between events."""
    return 1e3 * statistics.median(seconds(run, repeats, device, warm_up=1))


def layer(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A weight `[rows, columns]` and the Gram matrix of inputs with common directions and columns of different size."""
    source = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, device=device, generator=source)
    rank = min(256, columns // 4)
    common = torch.logspace(0, -1.5, rank, device=device)[:, None] * draw(rank, columns)
    scale = draw(columns).exp()
    gram = torch.zeros(columns, columns, device=device)
    for _ in range(2 * columns // 2048 + 1):
        x = (draw(2048, rank) @ common + 0.3 * draw(2048, columns)) * scale
        gram.addmm_(x.t(), x)
    return 0.02 * draw(rows, columns), gram


def error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """The squared error of the outputs relative to the dense outputs."""
    change = (pruned - weight).float()
    return float((change * (change @ gram)).sum(dtype=torch.float64) / (weight * (weight @ gram)).double().sum())


def attempted(name: str, work: Callable[[], Any]) -> Any:
    """The result of one part, or its error."""
    try:
        found = work()
    except Exception as error:  # device time is scarce and the other parts still count
        found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    print(json.dumps({name: found}), flush=True)
    return found


# Against the plain loop


def whole(weight: Tensor, gram: Tensor, pattern: Pattern, repeats: int) -> dict[str, Any]:
    """Milliseconds of the solver and of the plain loops, their ratios, errors, and the share of equal mask entries."""
    stats = LayerStats(1, 1, gram=gram)
    sorting = plain.largest(pattern.keep, pattern.group)
    ways: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "alps": lambda: pair(ALPS().solve(weight, stats, pattern)),
        "plain": lambda: plain.solve(weight, gram, sorting, pattern.density),
        "plain, fast projection": lambda: plain.solve(
            weight, gram, lambda matrix: pattern.top(matrix.t().abs()).t(), pattern.density
        ),
    }
    ms = {name: milliseconds(way, weight.device, repeats if name == "alps" else 1) for name, way in ways.items()}
    results = {name: way() for name, way in ways.items() if name != "plain, fast projection"}
    return {
        "ms": ms,
        "ratios": {f"{name} / alps": ms[name] / ms["alps"] for name in ms if name != "alps"},
        "errors": {name: error(weight, repaired, gram) for name, (_, repaired) in results.items()},
        "sparsegpt error": error(weight, pair(SparseGPT().solve(weight, stats, pattern))[1], gram),
        "equal mask entries": float((results["alps"][0] == results["plain"][0]).float().mean()),
        "iterations": ALPS().solve(weight, stats, pattern).figures["iterations"],
    }


def pair(pruned: Any) -> tuple[Tensor, Tensor]:
    return pruned.mask, pruned.weight


def parts(weight: Tensor, gram: Tensor, pattern: Pattern, repeats: int) -> dict[str, Any]:
    """Milliseconds of the factorisation and of an iteration, and of the ways that were not chosen."""
    problem = Problem.of(weight, gram, 0.01)
    shifted = problem.gram + PENALTY * torch.eye(len(gram), device=gram.device)
    inverse, lower = problem.factor(PENALTY), torch.linalg.cholesky(shifted)
    assert inverse is not None
    three = partial(search, problem, pattern, PENALTY, 3)
    ways: dict[str, Callable[[], Any]] = {
        "factor and inverse": lambda: problem.factor(PENALTY),
        "three iterations with their factor": three,
        "product": lambda: problem.dense @ inverse,
        "projection": lambda: pattern.top(problem.dense.abs()),
        "instead of product: triangular solves": lambda: torch.cholesky_solve(problem.dense.t(), lower),
        "instead of factor: Cholesky, float64": lambda: torch.linalg.cholesky(shifted.double()),
        "instead of factor: eigenvectors, float32": lambda: torch.linalg.eigh(problem.gram),
        "instead of factor: eigenvectors, float64": lambda: torch.linalg.eigh(problem.gram.double()),
    }
    found = {}
    for name, way in ways.items():
        times = 1 if "eigenvectors" in name else repeats
        found[name] = attempted(name, partial(milliseconds, way, weight.device, times))
    return found


# Against SparseGPT on a model


@torch.no_grad()
def layers(args: argparse.Namespace, pattern: Pattern) -> dict[str, Any]:
    """The errors of ALPS and SparseGPT on layers of a model, on the inputs of the dense model."""
    given = {"windows": args.windows, "window_tokens": args.window_tokens, "calibration": args.calibration}
    spec = {"methods": {"alps": {"method": "alps"}}, "model": args.model, "device": args.device, "patterns": ["2:4"]}
    chosen = {name: value for name, value in given.items() if value}
    experiment = prepared(checked(RunSpec.from_dict({**spec, **chosen}), load_plugins()))
    names = list(experiment.bundle.layers)
    wanted = set(names[:: max(len(names) // args.layers, 1)])
    rows: dict[str, dict[str, float]] = {}
    for step in walk(experiment.bundle, experiment.pools[0].calibration[: experiment.spec.windows], Stat.GRAM):
        for found in (found for found in step.layers if found.name in wanted):
            stats, weight = step.stats[found.name], found.read().float()
            with full_float32():
                rows[found.name] = {
                    name: error(weight, method.solve(weight, stats, pattern).weight, stats.gram)  # type: ignore[arg-type]
                    for name, method in (("alps", ALPS()), ("sparsegpt", SparseGPT()))
                }
            print(json.dumps({found.name: rows[found.name]}), flush=True)
    lower = sum(row["alps"] < row["sparsegpt"] for row in rows.values())
    mean = statistics.geometric_mean(row["alps"] / row["sparsegpt"] for row in rows.values())
    return {"model": Path(args.model).name, "lower": f"{lower} of {len(rows)}", "mean ratio": mean, "layers": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", action="append", help="ROWSxCOLUMNS; default 4096x4096 and 4096x14336")
    parser.add_argument("--pattern", type=Pattern.parse, default=Pattern(2, 4))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", help="measure layer errors of this model instead of times")
    parser.add_argument("--calibration")
    parser.add_argument("--windows", type=int)
    parser.add_argument("--window-tokens", type=int)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        **{"torch": torch.__version__, "python": platform.python_version(), "pattern": str(args.pattern)},
    }
    if args.model:
        result |= layers(args, args.pattern)
    else:
        result["shapes"] = timed(args, device)
    print(json.dumps({name: value for name, value in result.items() if name not in ("layers", "shapes")}))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def timed(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Every shape: the whole solver beside the plain loops, then its parts."""
    found = {}
    with full_float32():
        for shape in args.shape or (["4096x4096", "4096x14336"] if device.type == "cuda" else ["48x96"]):
            weight, gram = layer(*map(int, shape.split("x")), device)
            whole_ = attempted(f"{shape} whole", partial(whole, weight, gram, args.pattern, args.repeats))
            found[shape] = {**whole_, "parts": parts(weight, gram, args.pattern, args.repeats)}
    return found


if __name__ == "__main__":
    main()
