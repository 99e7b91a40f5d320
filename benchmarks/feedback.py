"""How well an error at the model's output tells the gradient at earlier blocks: why `flips` fails in deep models.

    python feedback.py --model FOLDER --text web.txt --json results/feedback_smollm2.json
    python feedback.py --model demo --text stories.txt --json results/feedback_demo.json

The model is pruned by Wanda. Backpropagation, which the learner `flips` does without, gives the gradient of KL(dense ||
pruned) by the residual stream after every block. For each block, cosines over all tokens, the first of every window
left out:

- `as it is`: of this gradient with that after the last block, which `flips` sends to every block as it is.
- `best map`: the same after a linear map, the best for the gradients of three quarters of the windows by ridge
  regression, on the others, with the best of three strengths. No feedback that is one matrix for all tokens does
  better.
- `own error`: of the gradient with the error of the residual stream at that place, pruned less dense.
- `evidence`: as it is, but of the sums over tokens of gradient x normed hidden state, which stand for E = T^T X.
- `other half`: of these sums by the true gradient, on the first half of the windows and on the second: what noise of
  tokens leaves.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from nmbench import Bundle, Pattern, load_plugins
from nmbench.experiment.environment import cpu_name
from nmbench.experiment.loading import load_model
from nmbench.methods import PrunedModel
from nmbench.models.applying import apply
from nmbench.models.dense_weights import DenseWeights
from nmbench.models.hooks import Observer, observing
from nmbench.pruning.one_shot import prune_one_shot
from nmbench_plugins.wanda import Wanda

RIDGES = (0.01, 0.1, 1.0)  # of the mean square; the best one counts
AT_ONCE = 2  # windows


class Seen(NamedTuple):
    """After one block, float32 `[windows, tokens, width]`: gradients, hidden states, and their errors."""

    gradient: Tensor
    hidden: Tensor
    error: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16, help="a multiple of 4")
    parser.add_argument("--window-tokens", type=int, default=256)
    parser.add_argument("--calibration-windows", type=int, default=64, help="of Wanda, before the others in the text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bundle = load_model(args.model, load_plugins(), dtype="float32", device=args.device)
    blocks = measured(args, bundle)
    rows = [row(index, block, blocks[-1]) for index, block in enumerate(blocks)]
    print(table(rows))
    if args.json:
        device = torch.cuda.get_device_name() if bundle.device.type == "cuda" else cpu_name()
        about = {"model": Path(args.model).name, "windows": args.windows, "window_tokens": args.window_tokens}
        about |= {"text": args.text.name, "masks": "wanda 2:4", "calibration_windows": args.calibration_windows}
        about |= {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def measured(args: argparse.Namespace, bundle: Bundle) -> list[Seen]:
    """What every block of the pruned model shows on the windows."""
    windows = read(args, bundle)
    dense = DenseWeights(bundle)
    patterns = dict.fromkeys(bundle.layers, Pattern(2, 4))
    pruned = prune_one_shot(bundle, dense, Wanda(), patterns, windows[: args.calibration_windows], "wanda").pruned
    parts = [seen(bundle, dense, pruned, part) for part in windows[args.calibration_windows :].split(AT_ONCE)]
    return [Seen(*map(torch.cat, zip(*blocks, strict=True))) for blocks in zip(*parts, strict=True)]


def read(args: argparse.Namespace, bundle: Bundle) -> Tensor:
    """The first windows of the text, int64 `[n, window_tokens]`."""
    count, tokens = args.calibration_windows + args.windows, args.window_tokens
    text = args.text.read_text(encoding="utf-8")[: 16 * count * tokens]  # characters: more than enough
    ids = torch.tensor(bundle.tokenizer(text)["input_ids"], device=bundle.device)
    if len(ids) < count * tokens:
        raise SystemExit(f"Error: {args.text} has {len(ids)} tokens; {count} windows of {tokens} are {count * tokens}.")
    return ids[: count * tokens].view(count, tokens)


def seen(bundle: Bundle, dense_weights: DenseWeights, made: PrunedModel, part: Tensor) -> list[Seen]:
    """What every block shows on a few windows; first tokens are left out."""
    dense_weights.put_back()
    with torch.no_grad(), hidden_states(bundle) as dense:
        wanted = bundle.model(part).logits.log_softmax(dim=-1)
    apply(bundle, made)
    with torch.enable_grad(), hidden_states(bundle) as pruned:
        own = bundle.model(part).logits.log_softmax(dim=-1)
        F.kl_div(own, wanted, reduction="sum", log_target=True).backward()
    found = [(it.grad, it.detach(), it.detach() - other) for it, other in zip(pruned, dense, strict=True)]
    return [Seen(*(tensor[:, 1:].clone() for tensor in one)) for one in found]


@contextmanager
def hidden_states(bundle: Bundle) -> Iterator[list[Tensor]]:
    """While the context is open, the list gets what every block returns, whose gradients are kept."""
    found: list[Tensor] = []

    def note(hidden: Tensor) -> None:
        if torch.is_grad_enabled():
            hidden.requires_grad_() if hidden.is_leaf else hidden.retain_grad()
        found.append(hidden)

    with observing(Observer(block, note, output=True) for block in bundle.blocks.values()):
        yield found


def row(index: int, block: Seen, last: Seen) -> dict[str, Any]:
    """The cosines of one block."""
    count = len(block.hidden)
    fitted, kept, half = slice(3 * count // 4), slice(3 * count // 4, None), count // 2
    maps = (mapped(last.gradient[fitted], block.gradient[fitted], ridge) for ridge in RIDGES)
    evidence = functools.partial(summed, hidden=block.hidden)
    return {
        "block": index,
        "as it is": cosine(last.gradient, block.gradient),
        "best map": max(cosine(last.gradient[kept] @ one, block.gradient[kept]) for one in maps),
        "own error": cosine(block.error, block.gradient),
        "evidence": cosine(evidence(last.gradient), evidence(block.gradient)),
        "other half": cosine(
            summed(block.gradient[:half], block.hidden[:half]), summed(block.gradient[half:], block.hidden[half:])
        ),
    }


def mapped(given: Tensor, wanted: Tensor, ridge: float) -> Tensor:
    """The linear map `[width, width]` that takes `given` to `wanted` best."""
    x, y = given.flatten(0, 1).double(), wanted.flatten(0, 1).double()
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.linalg.solve(gram, x.T @ y).to(given.dtype)


def summed(gradient: Tensor, hidden: Tensor) -> Tensor:
    """The sum over tokens of gradient x hidden state `[width, width]`, every hidden state of norm one."""
    return torch.einsum("nti,ntj->ij", gradient, F.normalize(hidden, dim=-1))


def cosine(one: Tensor, other: Tensor) -> float:
    return round(float(F.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0)), 3)


def table(rows: Sequence[dict[str, Any]]) -> str:
    names = list(rows[0])
    lines = [" | ".join(str(one[name]) for name in names) for one in rows]
    return "\n".join(f"| {line} |" for line in [" | ".join(names), "|".join(["---"] * len(names)), *lines])


if __name__ == "__main__":
    main()
