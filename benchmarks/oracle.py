"""Wanda and SparseGPT of nmbench beside the public functions of llm-compressor, on the same calibration tokens.

    pip install nmbench llmcompressor==0.14.0.1
    python oracle.py MODEL --calibration jsonl:c4.jsonl --test text:validation.txt --json results/oracle_smollm2.json

MODEL is the folder of a model whose blocks are `model.model.layers`, as Llama's. "Theirs" are the functions
`accumulate_*` and `sparsify_weight` of `wanda_sparsify` and `sgpt_sparsify`, called unchanged on the inputs that plain
hooks record in a plain loop over the blocks, without nmbench's walk. "Ours" is `nmbench run`. Both use the windows that
nmbench drew, and the losses of both are computed by `nmbench.evaluation.window_losses`.

Two walks need not end at the same perplexity, however alike the functions are. Where two scores of a group are equal to
the last bit of float32, rounding decides; a single such group changes the inputs of all later blocks, and few groups of
a small model decide much of its loss. Hence these figures. `same_inputs`: the share of equal mask entries if both
methods read the same inputs of every layer, those of their walk; `ours_same_inputs`: the perplexity of our method on
these inputs in all layers, beside `theirs`. `equal`: the share of equal mask entries of two walks, each on its own
blocks. `theirs_reversed`: their own perplexity with the windows in reversed order, which is equal but for rounding.
`theirs_tied`: their walk, but with our weights in the rows in which a mask differs on the same inputs, `tied_rows` of
them; the distance from this to ours is the difference of the implementations. It is not computed for SparseGPT, whose
weights are all rounded.

llm-compressor counts the weights that are *pruned*. It returns weights and no mask, so masks are compared by non-zero
weights, at the places where the dense weight is not zero either.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify
from llmcompressor.modifiers.pruning.wanda import wanda_sparsify
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from nmbench import Pattern, RunSpec, Scorer, load_plugins
from nmbench.calibration.statistics import Gatherer
from nmbench.calibration.walk import BATCH_TOKENS
from nmbench.data import cut
from nmbench.evaluation.losses import window_losses
from nmbench.experiment.plan import checked
from nmbench.experiment.setup import prepared
from nmbench.models.applying import applied
from nmbench.pruning.one_shot import choose
from nmbench.results.files import load_masks
from nmbench.run import run
from nmbench_plugins.sparsegpt import SparseGPT
from nmbench_plugins.wanda import Wanda

KEEP, GROUP = 2, 4
SHAPE = (1 - KEEP / GROUP, GROUP - KEEP, GROUP)  # sparsity, prune_n, prune_m
BLOCK_COLUMNS, DAMPING = 128, 0.01
VERSIONS = ("nmbench", "llmcompressor", "torch", "transformers")
Sums = dict[nn.Module, Tensor]


def wanda(layer: nn.Module, sums: Sums) -> Tensor:
    return wanda_sparsify.sparsify_weight(layer, sums, *SHAPE)


def sparsegpt(layer: nn.Module, sums: Sums) -> Tensor:
    return sgpt_sparsify.sparsify_weight(layer, sums, *SHAPE, BLOCK_COLUMNS, DAMPING, preserve_sparsity_mask=False)[1]


THEIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[[nn.Module, Sums], Tensor]]] = {
    "wanda": (wanda_sparsify.make_empty_row_scalars, wanda_sparsify.accumulate_row_scalars, wanda),
    "sparsegpt": (sgpt_sparsify.make_empty_hessian, sgpt_sparsify.accumulate_hessian, sparsegpt),
}


OURS = {"wanda": Wanda(), "sparsegpt": SparseGPT(damping=DAMPING, block_columns=BLOCK_COLUMNS)}


class Heard(Exception):
    """Raised to stop a forward pass at the first block."""


@torch.no_grad()
def prune(model: Any, windows: Tensor, method: str, tied: bool = False) -> tuple[float, int, Sums]:
    """Prune the blocks of `model` one after the other; windows `[windows, tokens]` go in batches as large as ours.

    Returns the share of mask entries that nmbench's method chooses too on the same inputs, the number of rows in which
    its mask differs, and its weights for the same inputs. With `tied`, rows that differ are taken from nmbench.
    """
    start, accumulate, sparsify = THEIRS[method]
    blocks = model.model.layers
    hidden, arguments = first_inputs(model, blocks[0], windows)
    equal = total = rows = 0
    mine: Sums = {}
    for block in blocks:
        layers = [module for module in block.modules() if isinstance(module, nn.Linear)]
        sums, seen = {layer: start(layer) for layer in layers}, dict.fromkeys(layers, 0)
        ours = {layer: Gatherer(OURS[method].needs, tuple(layer.weight.shape), windows.device) for layer in layers}

        def hear(layer: Any, args: tuple[Tensor, ...], sums: Sums = sums, seen: Any = seen, ours: Any = ours) -> None:
            sums[layer], seen[layer] = accumulate(args[0], layer, sums[layer], seen[layer])
            ours[layer].add(args[0])

        hooks = [layer.register_forward_pre_hook(hear) for layer in layers]
        for batch in hidden:
            block(batch, **arguments)
        for hook in hooks:
            hook.remove()
        for layer in layers:
            dense = layer.weight.detach().clone()
            theirs = sparsify(layer, sums).detach().clone()
            other = choose(OURS[method], dense, ours.pop(layer).finish(len(windows), "it"), Pattern(KEEP, GROUP))
            mine[layer] = applied(other, dense)
            same = ((theirs != 0) == other.mask) | (dense == 0)
            differ = ~same.all(dim=1)
            if tied:
                theirs[differ] = mine[layer][differ]
            layer.weight.data = theirs
            equal, total = equal + int(same[dense != 0].sum()), total + int(dense.count_nonzero())
            rows += int(differ.sum())
        hidden = [block(batch, **arguments) for batch in hidden]
    return equal / total, rows, mine


def first_inputs(model: Any, block: nn.Module, windows: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """The inputs of the first block for every batch, and its other arguments, which all batches share."""
    inputs: list[Tensor] = []
    arguments: dict[str, Any] = {}

    def hear(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0])
        arguments.update(kwargs)
        raise Heard

    hook = block.register_forward_pre_hook(hear, with_kwargs=True)
    for batch in windows.split(max(1, BATCH_TOKENS // windows.shape[1])):
        try:
            model(input_ids=batch, use_cache=False)
        except Heard:
            continue
    hook.remove()
    return inputs, arguments


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    return float(torch.cat([window_losses(model, window).double() for window in windows.split(1)]).mean().exp())


def agreement(model: Any, dense: Any, masks: dict[str, Tensor]) -> dict[str, float]:
    """The shares of equal mask entries in the first block, where the inputs are the same, and in all blocks."""
    equal: dict[str, list[int]] = {"first_block": [0, 0], "all": [0, 0]}
    for name, mask in masks.items():
        theirs, before = (m.get_submodule(name).weight != 0 for m in (model, dense))
        for where in ("first_block", "all") if ".layers.0." in name else ("all",):
            equal[where][0] += int((theirs == mask)[before].sum())
            equal[where][1] += int(before.sum())
    return {where: hits / total for where, (hits, total) in equal.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--test-window", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=Path("runs/oracle"))
    parser.add_argument("--json", type=Path, default=Path("oracle.json"))
    args = parser.parse_args()
    metric = f"ppl:{args.test}@{args.test_window}"
    spec = RunSpec.from_dict(
        {
            "methods": {name: {"method": name} for name in THEIRS},
            **{"model": str(args.model), "patterns": [f"{KEEP}:{GROUP}"], "device": "cpu", "dtype": "float32"},
            **{"calibration": args.calibration, "windows": args.windows, "window_tokens": args.window_tokens},
            "metrics": [metric],
        }
    )
    plugins = load_plugins()
    records = {record["label"]: record for record in run(spec, args.out, plugins).asked}
    experiment = prepared(checked(spec, plugins))
    bundle = experiment.bundle
    assert records["wanda"]["calibration_digest"] == experiment.calibration_digest(0)
    tokens = experiment.pools[0].calibration[: args.windows]
    test = cut(experiment.texts[args.test], args.test_window, args.test)
    content: dict[str, Any] = {
        **{"model": args.model.name, "pattern": f"{KEEP}:{GROUP}", "dtype": "float32", "device": "cpu"},
        **{"windows": args.windows, "window_tokens": args.window_tokens},
        **{"test_windows": len(test), "test_window": args.test_window},
        "versions": {name: version(name) for name in VERSIONS},
        "dense": records["dense"]["metrics"][metric]["value"],
    }
    for method in THEIRS:
        model, other = (AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval() for _ in range(2))
        same_inputs, _, mine = prune(model, tokens, method)
        prune(other, tokens.flip(0), method)
        theirs, reversed_ = perplexity(model, test), perplexity(other, test)
        masks = load_masks(args.out / "masks" / f"{method}--{KEEP}-{GROUP}--seed0.safetensors")
        alike = agreement(model, bundle.model, masks)
        for layer, weight in mine.items():
            layer.weight.data = weight
        beside = perplexity(model, test)
        ours = records[method]["metrics"][metric]["value"]
        content[method] = {
            **{"ours": ours, "theirs": theirs, "relative": ours / theirs - 1, "theirs_reversed": reversed_},
            **{"same_inputs": same_inputs, "ours_same_inputs": beside, "relative_same_inputs": beside / theirs - 1},
            "equal": alike,
        }
        if isinstance(OURS[method], Scorer):
            model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
            _, tied_rows, _ = prune(model, tokens, method, tied=True)
            tied, equal = perplexity(model, test), agreement(model, bundle.model, masks)
            content[method] |= {"theirs_tied": tied, "relative_tied": ours / tied - 1}
            content[method] |= {"tied_rows": tied_rows, "equal_tied": equal}
        print(f"{method}: {json.dumps(content[method])}", flush=True)
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
