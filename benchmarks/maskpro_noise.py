"""Signal and noise of MaskPro's estimator at its start: why it gains little from a good mask.

    python maskpro_noise.py --json results/maskpro_noise_demo.json
    python maskpro_noise.py --run RUN:swaps-judged:2:4:0 --run RUN:wanda:2:4:0 --device cuda --json noise.json

For every start mask, of a finished run or made here, the policy stays at its start and MaskPro's own code draws masks
and minibatches, measures losses and scales updates. Nothing is learnt:

- `grid`: the same masks on the same windows, so that the variance of a reward r(mask, window) = f(mask) - f(start) has
  three parts: of the mask, of the window, and of both together. A minibatch of n windows has the variance mask +
  (window + both) / n; with other masks on the same windows mask + both / n, with other windows (window + both) / n.
- `steps`: the residual, the baseline and the advantage of MaskPro's steps, and the sum of their updates.
- `gradient`: that of the expected loss of the policy, to first order: backpropagation through the masked weights gives
  the effect of every weight, weight x gradient, and the draws of a group are enumerated. Two halves of the windows give
  an unbiased square of its norm; `reliability` is the cosine of the halves.
- `cosine`: of the sum of the updates with the direction that lowers the expected loss, after 1, 16, 256 steps, with the
  noise of the true gradient taken out. `change`: of the expected loss, nats a step, by these updates and by updates
  without noise (the step size x the squared norm of the gradient).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from finished_rows import opened
from torch import Tensor

from nmbench import LearnTask, Pattern, RunSpec
from nmbench.evaluation import Objective, losses_in_parts
from nmbench.plain_data import read_toml
from nmbench.pruning import LiveWeights
from nmbench.results.address import address_of
from nmbench.run import run
from nmbench_plugins.maskpro import policy
from nmbench_plugins.maskpro.engines.logits import Drawn, Logits
from nmbench_plugins.maskpro.learner import MaskPro
from nmbench_plugins.maskpro.tracker import Rule, Tracker

STARTS = {"magnitude": {}, "swaps": {}, "swaps-judged": {"init": "swaps"}}  # label -> options, in this order
By = Mapping[Pattern, Tensor]  # float32 [groups, group] of units


def main() -> None:
    args = parser().parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for address in args.runs or made(args, args.out or Path(folder, "starts")):
            began = time.monotonic()
            rows.append({"start": named(address), **measured(address, args)})
            rows[-1]["seconds"] = round(time.monotonic() - began, 1)
            print(f"{rows[-1]['start']}: {rows[-1]['seconds']} s", file=sys.stderr, flush=True)
            if args.json:
                args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


def parser() -> argparse.ArgumentParser:
    """Return the options of the script."""
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("--run", dest="runs", action="append", help="a start: RUN_DIRECTORY:LABEL:N:M:SEED; repeatable")
    found.add_argument("--model", default="demo", help="of starts that are made here")
    found.add_argument("--config", type=Path, help="TOML of the run that makes the starts; its methods do not count")
    found.add_argument("--start", dest="starts", action="append", choices=tuple(STARTS), help="made here  [all]")
    found.add_argument("--out", type=Path, help="keep the run that makes the starts, or go on with it")
    found.add_argument("--device", default="cpu")
    found.add_argument("--dtype", help="[that of the run]")
    found.add_argument("--preset", choices=tuple(MaskPro.presets), help="of MaskPro's options  [the defaults]")
    found.add_argument("--steps", type=int, nargs="+", default=[1, 16, 256], help="numbers of steps to compare after")
    found.add_argument("--grid", type=int, nargs=2, default=[32, 64], metavar=("MASKS", "WINDOWS"))
    found.add_argument("--truth", type=int, default=256, help="windows of the true gradient")
    found.add_argument("--pool", type=int, default=512, help="windows that minibatches are drawn from, at most")
    found.add_argument("--seed", type=int, default=0, help="of draws, and of a run that is made here")
    found.add_argument("--json", type=Path)
    return found


def made(args: argparse.Namespace, out: Path) -> list[str]:
    """Make the start masks in the run directory `out`; return their addresses."""
    wanted = args.starts or list(STARTS)
    labels = [name for name in STARTS if name in wanted or (name == "swaps" and "swaps-judged" in wanted)]
    content = {"model": args.model, **(read_toml(args.config) if args.config else {})}
    content |= {"device": args.device, "seeds": [args.seed], **({"dtype": args.dtype} if args.dtype else {})}
    content["methods"] = {name: {"options": STARTS[name]} for name in labels}
    results = run(RunSpec.from_dict(content), out)
    if failed := [record["error"] for record in results.records if record["status"] != "ok"]:
        raise SystemExit(failed[0])
    pattern = next(record["pattern"] for record in results.records if record["pattern"])
    return [f"{out}:{name}:{pattern}:{args.seed}" for name in labels if name in wanted]


def named(address: str) -> str:
    """Return the address of a row without the folders of its run directory."""
    found = address_of(address)
    return address if found is None else address.replace(f"{found.directory}", found.directory.name, 1)


def measured(address: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one start."""
    experiment, task = opened(address, args.device, args.dtype)
    task.generator.manual_seed(args.seed)
    method = MaskPro(**(MaskPro.presets[args.preset] if args.preset else {}))
    windows = method.pool(task)[: args.pool]
    logits = Logits.prior(task, method.prior)
    kept = in_groups(task, {name: mask.float() for name, mask in task.initial.items()}, mean=True)
    effects = effects_of(task, windows[: args.truth], method.minibatch)
    halves = [gradient(logits, effect, kept) for effect in effects]
    with torch.no_grad(), task.live_weights() as live:
        live.apply(task.initial)
        references = losses_in_parts(task.loss, windows, method.minibatch)
        stepped = steps(task, method, live, logits, windows, references, kept, halves, args.steps)
        whole = {p: (effects[0][p] + effects[1][p]) / 2 for p in kept}
        grid = rewards(task, live, logits, windows, references, args.grid, whole, kept)
    options = {name: getattr(method, name) for name in ("prior", "learning_rate", "minibatch", "normalise", "tracker")}
    about = {"model": Path(experiment.bundle.ref).name, "environment": experiment.environment(), "options": options}
    shape = {"windows": len(windows), "window_tokens": windows.shape[1], "groups": sum(map(len, kept.values()))}
    minibatches = parts_of_variance(grid["components"], min(method.minibatch, len(windows)))
    return {**about, **shape, "grid": grid, "minibatch": minibatches, "gradient": truth(halves), **stepped}


def in_groups(task: LearnTask, values: Mapping[str, Tensor], mean: bool = False) -> dict[Pattern, Tensor]:
    """Return values `[out, in]` by layer as `[groups, group]` by pattern: the sum, or the mean, over each unit."""
    parts: dict[Pattern, list[Tensor]] = {}
    for name in task.layers:
        pattern = task.pattern[name]
        units = values[name].to(task.bundle.device).unflatten(1, (-1, pattern.unit))  # [out, units, unit]
        reduced = units.mean(-1) if mean else units.sum(-1)
        parts.setdefault(pattern, []).append(reduced.reshape(-1, pattern.units.group))  # [groups of the layer, group]
    return {pattern: torch.cat(layers) for pattern, layers in parts.items()}


def effects_of(task: LearnTask, windows: Tensor, minibatch: int) -> list[dict[Pattern, Tensor]]:
    """Return the first-order effect of keeping each weight on the mean loss, from each half of the windows."""
    found = []
    with task.gradients() as training:
        for half in (windows[::2], windows[1::2]):
            total = {name: torch.zeros(shape, device=task.bundle.device) for name, shape in task.layers.items()}
            for part in half.split(minibatch):
                training.clear()
                training.backward(part, Objective())
                for name, effect in total.items():
                    own = training.gradient(name).float() * training.dense(name).float()
                    effect.add_(own, alpha=len(part) / len(half))
            found.append(in_groups(task, total))
    return found


@torch.no_grad()
def gradient(logits: Logits, effects: By, kept: By) -> dict[Pattern, Tensor]:
    """Return the gradient of the expected loss by the logits: sum over draws of P x effect x grad log P.

    `effects`, `kept`: `[groups, group]`. The effect of a draw is counted from the start mask.
    """
    found = {}
    for pattern, flat in logits.flat.items():
        total = torch.zeros_like(flat)
        for chosen in itertools.combinations(range(pattern.units.group), pattern.units.keep):
            mask = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
            mask[:, list(chosen)] = True
            effect = (effects[pattern] * (mask.float() - kept[pattern])).sum(-1)
            weight = policy.log_prob(flat, mask).exp_() * effect
            total.addcmul_(policy.grad_log_prob(flat, mask), weight[:, None])
        found[pattern] = total
    return found


def dot(one: By, other: By) -> float:
    """Return the inner product over all patterns, summed in float64."""
    return sum(float((one[pattern].double() * other[pattern].double()).sum()) for pattern in one)


def truth(halves: Sequence[By]) -> dict[str, float]:
    """Return norm and reliability of the true gradient."""
    squared, norms = dot(*halves), [math.sqrt(dot(half, half)) for half in halves]
    return {"norm": root(squared), "reliability": squared / math.prod(norms) if min(norms) else math.nan}


def root(value: float) -> float:
    """Return the root, and NaN of a negative number, which noise can make of a square."""
    return math.sqrt(value) if value >= 0 else math.nan


def steps(
    task: LearnTask,
    method: MaskPro,
    live: LiveWeights,
    logits: Logits,
    windows: Tensor,
    references: Tensor,
    kept: By,
    halves: Sequence[By],
    after: Sequence[int],
) -> dict[str, Any]:
    """Return what MaskPro's steps know while the policy stays at its start."""
    tracker = Tracker(Rule(method.learning_rate, method.prior, method.tracker, method.normalise), task.bundle.device)
    batches = task.batches(method.minibatch, task.generator if method.shuffle else None, windows)
    total = {pattern: torch.zeros_like(flat) for pattern, flat in logits.flat.items()}
    residuals, advantages, factors, norms, flipped, compared = [], [], [], [], [], []
    for step in range(1, max(after) + 1):
        chosen, tokens = next(batches)
        drawn = logits.draw(task.generator)
        live.apply(drawn.by_layer)
        tracker.take(task.loss(tokens), references[chosen])
        figures, scale = tracker.figures(), float(tracker.scale)
        slopes = {p: scores(logits, p, drawn) for p in total}
        for pattern, slope in slopes.items():
            total[pattern].add_(slope, alpha=scale)
        residuals.append(figures.residual)
        advantages.append(figures.residual - figures.baseline)
        factors.append(-scale / advantages[-1] if advantages[-1] else 0.0)
        norms.append(abs(advantages[-1]) * math.sqrt(dot(slopes, slopes)))
        flipped.append(changed(drawn, kept))
        if step in after:
            compared.append({"steps": step, **against(total, halves, step)})
    factor = statistics.fmean(factors[len(factors) // 2 :])  # of the second half: the spread is known by then
    about = {
        "residual": spread(residuals),
        "advantage": spread(advantages),
        "groups_flipped": statistics.fmean(flipped),
    }
    noise = {"estimate_norm": statistics.fmean(norms), "step_size": factor}
    return {**about, **noise, "cosine": compared, "change_without_noise": -factor * dot(*halves)}


def scores(logits: Logits, pattern: Pattern, drawn: Drawn) -> Tensor:
    """Return the gradient of log P of the last mask drawn, `[groups, group]`."""
    found = logits.gradients.get(pattern)
    return policy.grad_log_prob(logits.flat[pattern], drawn.by_pattern[pattern]) if found is None else found


def changed(drawn: Drawn, kept: By) -> int:
    """Return the number of groups in which a drawn mask differs from the start."""
    return sum(int((drawn.by_pattern[p] != kept[p].bool()).any(-1).sum()) for p in kept)


def against(total: By, halves: Sequence[By], step: int) -> dict[str, float]:
    """Return the cosine of summed updates with the way down, and the change of the expected loss, nats a step."""
    along = statistics.fmean(dot(total, half) for half in halves)
    norm, true = math.sqrt(dot(total, total)), root(dot(*halves))
    return {"cosine": -along / (norm * true) if norm and true else math.nan, "change": along / step}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean and standard deviation."""
    return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values) if len(values) > 1 else math.nan}


def rewards(
    task: LearnTask,
    live: LiveWeights,
    logits: Logits,
    windows: Tensor,
    references: Tensor,
    size: Sequence[int],
    effects: By,
    kept: By,
) -> dict[str, Any]:
    """Return the parts of the variance of rewards, and how well the first order predicts the mean of each mask."""
    masks, count = size[0], min(size[1], len(windows))
    found, predicted = [], []
    for _ in range(masks):
        drawn = logits.draw(task.generator)
        live.apply(drawn.by_layer)
        found.append(task.loss(windows[:count]) - references[:count])
        predicted.append(dot(effects, {p: drawn.by_pattern[p].float() - kept[p] for p in kept}))
    table = torch.stack(found).double().cpu()  # [masks, windows]
    first_order = torch.corrcoef(torch.stack([table.mean(1), torch.tensor(predicted, dtype=torch.float64)]))[0, 1]
    size_of = {"masks": masks, "windows": count, "mean": float(table.mean())}
    return {**size_of, "components": components(table), "first_order_correlation": float(first_order)}


def components(table: Tensor) -> dict[str, float]:
    """Return the components of the variance of rewards `[masks, windows]`: of masks, of windows, of both together.

    The usual estimates of a two-way table without repeats; they are unbiased, and may be below zero.
    """
    masks, windows = table.shape
    rows, columns = table.mean(1, keepdim=True), table.mean(0, keepdim=True)
    rest = table - rows - columns + table.mean()
    both = float(rest.square().sum()) / ((masks - 1) * (windows - 1))
    return {
        "mask": float(rows.var()) - both / windows,
        "window": float(columns.var()) - both / masks,
        "both": both,
    }


def parts_of_variance(found: Mapping[str, float], size: int) -> dict[str, float]:
    """Return the variance of the reward of a minibatch of `size` windows, in all and with one of two things fixed."""
    other_masks = found["mask"] + found["both"] / size
    other_windows = (found["window"] + found["both"]) / size
    whole = found["mask"] + other_windows
    return {"size": size, "variance": whole, "same_windows": other_masks, "same_mask": other_windows}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return one line for every start."""
    counts = [one["steps"] for one in rows[0]["cosine"]]
    head = ["start", "groups flipped", "reward", "deviation", "same windows", "same mask", "true gradient", "estimate"]
    head += [*(f"cosine, {count}" for count in counts), "nats a step", "without noise"]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *map(line, rows)])


def line(row: Mapping[str, Any]) -> str:
    """Return the line of one start: deviations are roots of the variances."""
    deviations = (root(row["minibatch"][name]) for name in ("variance", "same_windows", "same_mask"))
    cells: Iterator[str] = itertools.chain(
        [row["start"], f"{row['groups_flipped']:.0f} of {row['groups']:,}", f"{row['grid']['mean']:+.2e}"],
        (f"{value:.1e}" for value in deviations),
        (f"{row['gradient']['norm']:.2e}", f"{row['estimate_norm']:.2e}"),
        (f"{one['cosine']:.4f}" for one in row["cosine"]),
        (f"{row['cosine'][-1]['change']:+.1e}", f"{row['change_without_noise']:+.1e}"),
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
