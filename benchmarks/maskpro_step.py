"""The time of a MaskPro step over the forward pass that it contains, and its memory.

    python maskpro_step.py --model gguf:MODEL.gguf --model llama-8b --json results/maskpro_step.json

For every model and minibatch, in one process: the bare forward pass with its loss, and the whole step (forward, loss,
update, draw), both as CUDA graphs of the same kernels; then what is allocated for the prunable weights. `llama-8b` has
the shape of Llama 3 8B and random weights, because speed and memory do not depend on their values. Needs a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nmbench import Bundle, LearnTask, Pattern, load_plugins
from nmbench.evaluation.losses import window_losses
from nmbench.experiment.environment import version
from nmbench.experiment.loading import load_model
from nmbench.models import ignoring_packed_windows
from nmbench.models.bundle import Layer
from nmbench.pruning.live_weights import LiveWeights
from nmbench.results.files import MemoryCheckpoints
from nmbench_plugins.maskpro.engines import Engine, StreamedEngine, choose
from nmbench_plugins.maskpro.engines.step_graph import record
from nmbench_plugins.maskpro.tracker import Rule

SHAPES = {
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
}
WINDOW = 128


class Undisturbed:
    """The live weights in place of copies of the dense weights: the streamed engine never writes to live weights."""

    def layer(self, layer: Layer) -> Tensor:
        return layer.read()

    def restore(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--minibatch", type=int, action="append", help="windows of 128 tokens; default 8 and 32")
    parser.add_argument("--logits", action="append", choices=("float32", "float16"), help="default both")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for name in args.model:
        bundle = bundle_of(name)
        for logits in args.logits or ("float32", "float16"):
            for size in args.minibatch or (8, 32):
                rows.append({"model": Path(name).name, **measure(bundle, size, logits, args.repeats)})
                print(line(rows[-1]), flush=True)
        del bundle
        gc.collect()
        torch.cuda.empty_cache()
    if args.json:
        versions = {package: version(package) for package in ("torch", "transformers", "triton")}
        about = {"device": torch.cuda.get_device_name(), **versions}
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def bundle_of(name: str) -> Bundle:
    """A model in bfloat16 on the GPU."""
    if name not in SHAPES:
        return load_model(name, load_plugins(), dtype="bfloat16", device="cuda")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(LlamaConfig(**SHAPES[name]))
    finally:
        torch.set_default_dtype(before)
    return Bundle.of(name, model, None)


@torch.no_grad()
def measure(bundle: Bundle, size: int, logits: str, repeats: int) -> dict[str, Any]:
    """Time the bare forward pass and the step on minibatches of `size` windows; count bytes."""
    vocabulary = bundle.model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocabulary, (size, WINDOW), device=bundle.device)
    references = torch.zeros(size, device=bundle.device)
    forward_ms = forward_milliseconds(bundle, tokens, references, repeats)
    gc.collect()
    torch.cuda.empty_cache()
    task = task_of(bundle)
    weights = sum(layer.read().numel() for layer in bundle.layers.values())
    dense = sum(layer.read().nbytes for layer in bundle.layers.values())
    before = torch.cuda.memory_allocated()
    with task.live_weights() as live:
        engine = streamed(task, live, logits)
        added = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        engine.advance(tokens, references)
        step_ms = milliseconds(lambda: engine.advance(tokens, references), repeats)
        step_again_ms = milliseconds(lambda: engine.advance(tokens, references), repeats)
        assert engine.figures().broken is None
        note = engine.note
    return {
        "minibatch": size,
        "window_tokens": WINDOW,
        "logits": logits,
        "forward_ms": round(forward_ms, 3),
        "step_ms": round(step_ms, 3),
        "step_again_ms": round(step_again_ms, 3),
        "ratio": round(step_ms / forward_ms, 3),
        "masks_per_second": round(1000 / step_ms, 1),
        "prunable_weights": weights,
        "bytes_per_weight": round((dense + added) / weights, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "note": note,
    }


def forward_milliseconds(bundle: Bundle, tokens: Tensor, references: Tensor, repeats: int) -> float:
    bare = record(lambda t, r: forward(bundle, t, r), tokens, references, ())
    return milliseconds(lambda: bare.replay(tokens, references), repeats)


def forward(bundle: Bundle, tokens: Tensor, references: Tensor) -> None:
    """The part of a step that is not MaskPro's: the forward pass and the losses."""
    with ignoring_packed_windows():
        references.copy_(window_losses(bundle.model, tokens))


def task_of(bundle: Bundle) -> LearnTask:
    """A task whose initial mask keeps the first half of every group, without copies of the weights."""
    keep = torch.tensor([True, True, False, False])
    initial = {n: keep.repeat(la.shape[1] // 4).expand(la.shape) for n, la in bundle.layers.items()}
    patterns = dict.fromkeys(bundle.layers, Pattern(2, 4))
    windows = torch.zeros(8, WINDOW, dtype=torch.int64)
    weights: Any = Undisturbed()
    return LearnTask(bundle, weights, patterns, initial, windows, windows, 0, MemoryCheckpoints(), "maskpro")


def streamed(task: LearnTask, live: LiveWeights, logits: str) -> Engine:
    engine = choose(task, live, Rule(1.0, 10.0, 0.99, True), "streamed", logits)
    assert isinstance(engine, StreamedEngine)
    return engine


def milliseconds(run: Callable[[], Any], repeats: int) -> float:
    """Median time of a call on the device."""
    for _ in range(3):
        run()
    pairs: Sequence[Any] = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)
    ]
    for begin, end in pairs:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs)


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['model'][-24:]:>24} {row['minibatch']:>3} x {row['window_tokens']} {row['logits']}: "
        f"forward {row['forward_ms']:8.2f} ms, step {row['step_ms']:8.2f} ms, ratio {row['ratio']:.2f}, "
        f"{row['bytes_per_weight']:.2f} bytes a weight, peak {row['peak_gib']:.1f} GiB {row['note']}"
    )


if __name__ == "__main__":
    main()
