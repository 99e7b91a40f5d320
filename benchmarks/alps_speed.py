"""The time of ALPS on one layer beside its plain loop, of each part, and its layer error beside SparseGPT's.

    python alps_speed.py --json results/alps_speed_h100.json
    python alps_speed.py --model FOLDER --calibration text:FILE --json results/alps_layers.json

Layers have 4096 x 4096 and 4096 x 14336 weights (out x in), and the Gram matrix of correlated inputs of different size.
`plain` is the loop of the paper, `tests/reference/alps.py`: eigenvectors in float64, the inverse made of them at every
change of the penalty, a sort as the projection. `plain, fast projection` is the same with `Pattern.top`. All are timed
in one process by CUDA events, medians after warm-up, with TF32 off but for ALPS's search. `alps, search in float32`
has TF32 off there too. `parts` are the milliseconds of the search and the repair, of one inverse and one iteration and
their pieces, and of the choices not taken. `accuracy` has the relative errors of the products against float64. A part
that fails is reported, and the others go on. `split` products are three TF32 products of a high and a low part each.

With `--model`, all layers of that model are pruned on the inputs of the dense model: the squared error of the outputs
relative to the dense outputs, by ALPS and by SparseGPT, and on how many layers ALPS is lower. Only calibration text is
read, so that no hub is needed for a local model and `--calibration text:FILE`. `--device cpu` runs tiny layers, and the
demo with `--model demo`: a test of this file, not of speed.
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
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from nmbench import LayerStats, Pattern, RunSpec, Stat, load_plugins
from nmbench.calibration import full_float32, tf32, walk
from nmbench.experiment.environment import cpu_name
from nmbench.experiment.plan import checked
from nmbench.experiment.setup import prepared
from nmbench.pruning import conjugate_gradients
from nmbench_plugins.alps import ALPS, admm
from nmbench_plugins.alps.admm import Found, iterated, search
from nmbench_plugins.alps.inverse import gram_of, inverse_of, triangular_inverse
from nmbench_plugins.alps.problem import Problem
from nmbench_plugins.sparsegpt import SparseGPT
from reference import alps as plain

PENALTY = 0.1
OFFLINE = "ppl:demo@256"  # a metric whose text is part of nmbench; it is not measured


def milliseconds(run: Callable[[], Any], device: torch.device, repeats: int, warm_up: int = 1) -> float:
    """Median milliseconds of a call after `warm_up` that are not counted; on a GPU between events."""
    return 1e3 * statistics.median(seconds(run, repeats, device, warm_up))


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
        "alps, search in float32": lambda: strict(lambda: pair(ALPS().solve(weight, stats, pattern))),
        "plain": lambda: plain.solve(weight, gram, sorting, pattern.density),
        "plain, fast projection": lambda: plain.solve(
            weight, gram, lambda matrix: pattern.top(matrix.t().abs()).t(), pattern.density
        ),
    }
    results: dict[str, tuple[Tensor, Tensor]] = {}
    ms = {
        name: milliseconds(
            partial(kept_result, results, name, way), weight.device, repeats if name.startswith("alps") else 1
        )
        for name, way in ways.items()
    }
    kept = results["plain"][0]
    return {
        "ms": ms,
        "ratios": {f"{name} / alps": ms[name] / ms["alps"] for name in ms if name != "alps"},
        "errors": {name: error(weight, repaired, gram) for name, (_, repaired) in results.items()},
        "sparsegpt error": error(weight, pair(SparseGPT().solve(weight, stats, pattern))[1], gram),
        "mask entries equal to plain": {
            name: float((mask == kept).float().mean()) for name, (mask, _) in results.items()
        },
        "iterations": ALPS().solve(weight, stats, pattern).figures["iterations"],
    }


def kept_result(results: dict[str, tuple[Tensor, Tensor]], name: str, way: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """Store the result of one way."""
    results[name] = way()


def pair(pruned: Any) -> tuple[Tensor, Tensor]:
    return pruned.mask, pruned.weight


def strict(run: Callable[[], Any]) -> Any:
    """The result of a call with a search whose products are not in TF32."""
    allowed, admm.tf32 = admm.tf32, full_float32  # type: ignore[attr-defined]
    try:
        return run()
    finally:
        admm.tf32 = allowed  # type: ignore[attr-defined]


# Parts


def parts(weight: Tensor, gram: Tensor, pattern: Pattern, repeats: int) -> dict[str, Any]:
    """Milliseconds of the steps, of their pieces, and of the ways that were not chosen; the accuracy of products."""
    problem = Problem.of(weight, gram, 0.01)
    found = search(problem, pattern, PENALTY, 300)
    assert found is not None
    ways = {
        **steps(problem, found, pattern),
        **inverse_pieces(problem),
        **iteration_pieces(problem, found, pattern),
        **not_taken(problem, found),
    }
    found_ms = {}
    for name, way in ways.items():
        repeated = (1, 0) if "eigenvectors" in name else (repeats, 1)
        found_ms[name] = attempted(name, partial(milliseconds, way, weight.device, *repeated))
    return {**found_ms, "accuracy": attempted("accuracy", partial(accuracy, problem, found))}


def steps(problem: Problem, found: Found, pattern: Pattern) -> dict[str, Callable[[], Any]]:
    """The steps of the solver: set-up, search, linear term, repair. `found` is the result of the search."""
    weight, gram, linear = problem.dense / problem.scale, problem.gram, problem.linear()
    repair = partial(conjugate_gradients, found.weight, found.mask, gram, linear, 10, 1e-4)
    return {
        "set-up": lambda: Problem.of(weight, gram, 0.01),
        "search": lambda: search(problem, pattern, PENALTY, 300),
        "linear term": problem.linear,
        "repair": repair,
        "repair, TF32": lambda: with_tf32(repair),
        "repair, split products": lambda: with_split(repair),
    }


def inverse_pieces(problem: Problem) -> dict[str, Callable[[], Any]]:
    """One inverse and its pieces. Some overwrite a copy of the factor: subtract `copy of n x n`."""
    shifted = problem.gram + PENALTY * torch.eye(len(problem.gram), device=problem.gram.device)
    lower = torch.linalg.cholesky(shifted)
    triangular = triangular_inverse(lower.clone())
    return {
        "inverse": lambda: with_tf32(lambda: problem.inverse(PENALTY)),
        "copy of n x n": lower.clone,
        "Cholesky, float32": lambda: torch.linalg.cholesky_ex(shifted),
        "Cholesky, float64": lambda: torch.linalg.cholesky_ex(shifted.double())[0].float(),
        "triangular inverse, TF32": lambda: with_tf32(lambda: triangular_inverse(lower.clone())),
        "triangular inverse, float32": lambda: triangular_inverse(lower.clone()),
        "its blocks on the diagonal": lambda: diagonal_inverses(lower, 1024),
        "Gram of the triangular inverse, TF32": lambda: with_tf32(lambda: gram_of(triangular)),
        "the same in one product, TF32": lambda: with_tf32(lambda: triangular.t() @ triangular),
        **{
            f"inverse of the factor, blocks of {rows}, TF32": partial(blocked_inverse, lower, rows)
            for rows in (256, 512, 1024, 2048)
        },
    }


def iteration_pieces(problem: Problem, found: Found, pattern: Pattern) -> dict[str, Callable[[], Any]]:
    """One iteration and its pieces."""
    dense, inverse = problem.dense, problem.inverse(PENALTY)
    assert inverse is not None
    return {
        "iteration, TF32": lambda: with_tf32(lambda: iterated(dense, dense.clone(), found.mask, inverse, PENALTY)),
        "copy of out x n": dense.clone,
        "product, float32": lambda: dense @ inverse,
        "product, TF32": lambda: with_tf32(lambda: dense @ inverse),
        "product, split": lambda: with_split(lambda: dense @ inverse),
        "projection": lambda: pattern.top(dense.abs()),
        "change of the mask": lambda: int((found.mask != found.mask).sum()),
    }


def not_taken(problem: Problem, found: Found) -> dict[str, Callable[[], Any]]:
    """Other ways to the inverse or its product."""
    shifted = problem.gram + PENALTY * torch.eye(len(problem.gram), device=problem.gram.device)
    lower = torch.linalg.cholesky(shifted)
    triangular = triangular_inverse(lower.clone())
    return {
        "instead of inverse: cholesky_inverse": lambda: torch.cholesky_inverse(lower),
        "instead of inverse: two products, TF32": lambda: with_tf32(
            lambda: problem.dense @ triangular.t() @ triangular
        ),
        "instead of inverse: triangular solves": lambda: torch.cholesky_solve(problem.dense.t(), lower),
        "eigenvectors, float32": lambda: torch.linalg.eigh(problem.gram),
        "eigenvectors, float64": lambda: torch.linalg.eigh(problem.gram.double()),
    }


def diagonal_inverses(lower: Tensor, rows: int) -> None:
    """Invert the blocks on the diagonal."""
    for block in zip(lower.split(rows), range(0, len(lower), rows), strict=True):
        square = block[0][:, block[1] : block[1] + rows]
        torch.linalg.solve_triangular(square, torch.eye(len(square), device=lower.device), upper=False)


def blocked_inverse(lower: Tensor, rows: int) -> Tensor:
    """The inverse from a copy of the factor by blocks of this many rows, in TF32."""
    with tf32():
        return inverse_of(lower.clone(), rows)


def with_tf32(run: Callable[[], Any]) -> Any:
    with tf32():
        return run()


def with_split(run: Callable[[], Any]) -> Any:
    with tf32(), Split():
        return run()


class Split(TorchDispatchMode):
    """Every float32 product becomes three products of a high and a low part, both exact in TF32 (low: rounded)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten.mm.default:
            return split_product(*args)
        if func is aten.addmm.default:
            return split_product(*args[1:]).add_(args[0])
        return func(*args, **(kwargs or {}))


def split_product(a: Tensor, b: Tensor) -> Tensor:
    """The product of `a` and `b` by three products of parts."""
    (high, low), (other_high, other_low) = halves(a), halves(b)
    return torch.mm(low, other_high).addmm_(high, other_low).addmm_(high, other_high)


def halves(a: Tensor) -> tuple[Tensor, Tensor]:
    """The leading 10 bits after the point, and the rest."""
    high = (a.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)
    return high, a - high


def accuracy(problem: Problem, found: Found) -> dict[str, float]:
    """The relative errors of a product with the inverse, and of the error of the layer after repairs, by products."""
    inverse, linear, rows = problem.inverse(PENALTY), problem.linear(), slice(0, 256)
    assert inverse is not None
    exact = problem.dense[rows].double() @ inverse.double()
    shifted = problem.gram.double()
    shifted.diagonal().add_(PENALTY)
    rounded = with_tf32(lambda: problem.inverse(PENALTY))
    repair = partial(conjugate_gradients, found.weight, found.mask, problem.gram, linear, 10, 1e-4)
    ways: dict[str, Callable[[Callable[[], Any]], Any]] = {
        "float32": lambda run: run(),
        "TF32": with_tf32,
        "split": with_split,
    }
    products = {f"product, {name}": way(lambda: problem.dense[rows] @ inverse) for name, way in ways.items()}
    errors = {name: float((found - exact).norm() / exact.norm()) for name, found in products.items()}
    residuals = {
        f"residual of the inverse, {name}": float(
            (exact_part(shifted, x) - problem.dense[rows]).norm() / problem.dense[rows].norm()
        )
        for name, x in (("float32", problem.dense[rows] @ inverse), ("TF32", problem.dense[rows] @ rounded))
    }
    repaired = {
        f"layer error, repair with {name} products": error(problem.dense, way(repair), problem.gram)
        for name, way in ways.items()
    }
    return errors | residuals | repaired


def exact_part(shifted: Tensor, found: Tensor) -> Tensor:
    """`found` times the float64 matrix `shifted`."""
    return found.double() @ shifted


# Against SparseGPT on a model


@torch.no_grad()
def layers(args: argparse.Namespace, pattern: Pattern) -> dict[str, Any]:
    """The errors of ALPS and SparseGPT on the layers of a model, on the inputs of the dense model."""
    given = {"windows": args.windows, "window_tokens": args.window_tokens, "calibration": args.calibration}
    spec = {"methods": {"alps": {"method": "alps"}}, "model": args.model, "device": args.device, "patterns": ["2:4"]}
    spec["metrics"] = [OFFLINE]
    chosen = {name: value for name, value in given.items() if value}
    experiment = prepared(checked(RunSpec.from_dict({**spec, **chosen}), load_plugins()))
    rows: dict[str, dict[str, float]] = {}
    for step in walk(experiment.bundle, experiment.pools[0].calibration[: experiment.spec.windows], Stat.GRAM):
        for found in step.layers:
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
