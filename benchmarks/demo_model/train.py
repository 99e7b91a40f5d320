"""Trains the demo model: a small Llama on random crops of prose and plays, bfloat16, one GPU.

    python train.py --tokens TOKENS --out OUT [--layers 4] [--total-tokens 250000000] [--lr 3e-3]

TOKENS is what prepare.py wrote; weights and config go to OUT/model. Every figure of the log is printed and written to
OUT/train-log.jsonl. Held-out losses are taken on fixed windows: of the selection plays, of the held-out prose, and, for
comparison, of the training text itself. The test plays are not opened here.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

WINDOW = 256
EVAL_WINDOWS = 256


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    text = {path.stem: torch.from_numpy(np.load(path).astype(np.int64)).cuda() for path in args.tokens.glob("*.npy")}
    model = LlamaForCausalLM(config(args.layers)).cuda()
    loss_of = torch.compile(Loss(model))
    optimizer = adamw(model, args.lr)
    steps = args.total_tokens // (args.batch * WINDOW)
    log = Log(args.out)
    log.write(parameters=sum(p.numel() for p in model.parameters()), steps=steps, **printable(vars(args)))
    fixed = {name: windows(text[name]) for name in ("selection", "heldout-prose")}
    fixed |= {f"train-{name}": crops(text[name], EVAL_WINDOWS) for name in ("plays", "prose")}
    started = time.perf_counter()
    for step in range(steps + 1):
        if step % args.eval_every == 0 or step == steps:
            seconds = time.perf_counter() - started
            losses = {name: round(evaluate(model, batch), 4) for name, batch in fixed.items()}
            log.write(step=step, tokens=step * args.batch * WINDOW, seconds=round(seconds, 1), **losses)
        if step == steps or time.perf_counter() - started > args.max_seconds:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(step, steps)
        loss = loss_of(mixed_crops(text, args.batch, args.plays_share))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.to(torch.bfloat16).save_pretrained(args.out / "model")
    log.write(done=step == steps, steps=step, seconds=round(time.perf_counter() - started, 1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--batch", type=int, default=512, help="windows per step")
    parser.add_argument("--total-tokens", type=int, default=250_000_000)
    parser.add_argument("--eval-every", type=int, default=500)
    parser.add_argument("--max-seconds", type=float, default=1e9, help="stop there, unfinished, and say so in the log")
    parser.add_argument("--plays-share", type=float, default=0.08, help="of the crops; they are 8 %% of the text")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def config(layers: int) -> LlamaConfig:
    """Every width is a multiple of 32, so that all patterns up to N:32 fit."""
    return LlamaConfig(
        vocab_size=4096,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.04,
        use_cache=False,
    )


class Loss(nn.Module):
    """Mean cross-entropy of a batch of windows under bfloat16 autocast."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = self.model(input_ids=tokens, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def adamw(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """Weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over 2 % of the steps, then a cosine down to 2 % of the peak."""
    warm = max(1, steps // 50)
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def mixed_crops(text: dict[str, Tensor], count: int, plays_share: float) -> Tensor:
    """Random crops `[count, WINDOW]`, a fixed share of them from the plays."""
    plays = round(plays_share * count)
    return torch.cat([crops(text["plays"], plays), crops(text["prose"], count - plays)])


def crops(tokens: Tensor, count: int) -> Tensor:
    starts = torch.randint(len(tokens) - WINDOW + 1, (count, 1), device=tokens.device)
    return tokens[starts + torch.arange(WINDOW, device=tokens.device)]


def windows(tokens: Tensor) -> Tensor:
    """Non-overlapping windows from the beginning, `[n, WINDOW]`."""
    return tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)


@torch.no_grad()
def evaluate(model: nn.Module, batch: Tensor) -> float:
    """Mean loss in nats, float32, without autocast."""
    losses = []
    for part in batch.split(64):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
        losses.append(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none"))
    return float(torch.cat(losses).mean())


class Log:
    """JSON lines on the screen and in OUT/train-log.jsonl."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "train-log.jsonl"
        self.path.write_text("")

    def write(self, **values: object) -> None:
        line = json.dumps(values)
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def printable(values: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in values.items() if not isinstance(value, Path)}


if __name__ == "__main__":
    main()
