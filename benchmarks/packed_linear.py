"""The time of packed products beside dense ones at decoding, and tokens a second of generation with either.

    python packed_linear.py --json results/packed_linear_h100.json
    python packed_linear.py --tune --pattern 2:4 --batch 1 --json results/packed_linear_tune.json
    python packed_linear.py --packed FOLDER --only generation --json results/packed_generation.json

Products are of the large layers of the 8-billion shape. Each is one CUDA graph of products with several copies of a
weight, more bytes than the second level cache holds, so that weights come from memory as in a model; `dense` is
`F.linear`, which is cuBLAS there. `bound` is the ratio of the bytes that dense and packed products move; `copy_gb` is
the measured bandwidth of a copy, reads and writes counted. `program` says which program multiplied: cuda, triton, or
null if the weight was unpacked. `--tune` times several forms of the program and reports the best. Generation is greedy,
token by token, each step one CUDA graph, of a random model of the shape or of the packed model in a folder: its weights
packed, then the same weights dense, in one process. `--device cpu` runs tiny layers and a tiny model without graphs: a
test of this file, not of speed.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from shapes import SHAPES, random_model
from timing import seconds
from torch import Tensor, nn
from transformers import StaticCache

from nmbench import Pattern
from nmbench.experiment.environment import version
from nmbench.runtime import PackedLinear, PackedWeight, graph_of, load_packed, pack, packed_share
from nmbench.runtime.packed import by_cuda, by_triton, packed_layers
from nmbench.runtime.packed.launch import program_of
from nmbench.runtime.packed.reference import product as plain_product

COLD_BYTES = 2**28  # of copies of one packed weight: five times the second level cache of an H100
COPY_BYTES = 2**30
TRITON = ((1, 128, 1), (2, 128, 1), (2, 128, 2), (4, 128, 2), (4, 128, 4), (8, 128, 4), (2, 256, 1), (2, 256, 2))
TRITON += ((4, 128, 1), (4, 256, 4), (8, 64, 4), (8, 256, 8), (16, 128, 4))
CUDA = ((8, 2, False, 4), (8, 2, False, 3), (8, 4, False, 2), (8, 1, False, 4), (8, 1, True, 4), (8, 2, True, 2))
CUDA += ((4, 2, False, 8), (4, 2, False, 6), (4, 4, False, 4), (4, 2, True, 4), (4, 4, True, 3), (2, 4, False, 8))
CUDA += ((16, 2, False, 2), (16, 4, False, 1), (16, 1, True, 2))
TUNED: dict[str, list[Any]] = {
    "cuda": [by_cuda.Launch(*numbers) for numbers in CUDA],
    "triton": [by_triton.Launch(*numbers) for numbers in TRITON],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--pattern", type=Pattern.parse, action="append")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--shape", choices=sorted(SHAPES))
    parser.add_argument("--blocks", type=int, help="blocks of the random model  [all]")
    parser.add_argument("--packed", type=Path, help="a folder of `nmbench export --for packed` to generate with")
    parser.add_argument("--only", choices=["products", "generation"])
    parser.add_argument("--program", choices=["cuda", "triton"], help="of products  [the one that a layer uses]")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tokens", type=int, help="tokens generated  [128; 8 on a CPU]")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.device = torch.device(args.device)
    args.shape = args.shape or ("tiny" if args.device.type == "cpu" else "llama-3.1-8b")
    args.tokens = args.tokens or (8 if args.device.type == "cpu" else 128)
    args.pattern = args.pattern or [Pattern(2, 4), Pattern(4, 8), Pattern(8, 16)]
    args.batch = args.batch or [1, 2, 4, 8]
    with torch.inference_mode():
        found = {**about(args), "products": [], "generation": []}
        if args.only != "generation":
            found["products"] = list(products(args, found["copy_gb"]))
        if args.only != "products":
            found["generation"] = list(generations(args))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def about(args: argparse.Namespace) -> dict[str, Any]:
    """Device, versions and the bandwidth of a copy."""
    versions = {package: version(package) for package in ("torch", "transformers", "triton")}
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else "cpu"
    found = {"device": name, **versions, "shape": args.shape, "copy_gb": round(copy_bandwidth(args) / 1e9, 1)}
    print(json.dumps(found), flush=True)
    return found


def copy_bandwidth(args: argparse.Namespace) -> float:
    """Bytes read and written a second by a copy within the device's memory."""
    size = COPY_BYTES if args.device.type == "cuda" else 2**20
    source = torch.empty(size, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    return 2 * size / once(lambda: target.copy_(source), args)


def once(call: Callable[[], Any], args: argparse.Namespace) -> float:
    """Median seconds of a call; on a GPU as one CUDA graph."""
    run = graph_of(call).replay if args.device.type == "cuda" else call
    return statistics.median(seconds(run, args.repeats, args.device, warm_up=3))


def products(args: argparse.Namespace, copy_gb: float) -> Iterator[dict[str, Any]]:
    """Rows of figures: every shape of layer, pattern and batch."""
    shape = SHAPES[args.shape]
    layers = [(shape.inner, shape.width), (shape.width, shape.inner), (shape.width, shape.width)]
    layers.append((shape.kv_heads * shape.width // shape.heads, shape.width))
    for rows, columns in dict.fromkeys(layers):
        for pattern in args.pattern:
            if pattern.divides(columns):
                packed, dense = weights(rows, columns, pattern, args.device)
                for batch in args.batch:
                    row = {"out": rows, "in": columns, "pattern": str(pattern), "batch": batch}
                    yield said({**row, **timed(packed, dense, batch, copy_gb, args)})
                del packed, dense


def said(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row and return it."""
    print(json.dumps(row), flush=True)
    return row


def weights(rows: int, columns: int, pattern: Pattern, device: torch.device) -> tuple[list[PackedWeight], list[Tensor]]:
    """Copies of a random bfloat16 weight that is strictly N:M, packed and dense, each more than the cache holds."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator, device=device).bfloat16()
    weight = weight.masked_fill(~pattern.top(weight.abs()), 0.0)
    packed = pack(weight, pattern)
    cold = COLD_BYTES if device.type == "cuda" else 1
    first, others = packed, range(1, -(-cold // packed.bytes))
    copies = [PackedWeight(first.values.clone(), first.codes.clone(), pattern, columns) for _ in others]
    return [packed, *copies], [weight, *(weight.clone() for _ in range(1, -(-cold // weight.nbytes)))]


def timed(
    packed: list[PackedWeight], dense: list[Tensor], batch: int, copy_gb: float, args: argparse.Namespace
) -> dict[str, Any]:
    """Microseconds of one product, dense and packed, their ratio, its bound by bytes, and the error of the product."""
    x = torch.randn(batch, packed[0].inputs, device=args.device).bfloat16()
    dense_seconds = once(lambda: [F.linear(x, weight) for weight in dense], args) / len(dense)
    program = args.program or program_of(packed[0], x)
    launches = TUNED[program] if args.tune and program else [default(program, packed[0], batch)]
    tried = {launched: once(multiply(packed, x, program, launched), args) / len(packed) for launched in launches}
    best = min(tried, key=lambda launched: tried[launched])
    ours = multiply(packed[:1], x, program, best)()[0]
    wanted = plain_product(packed[0], x)
    small = x.nbytes + ours.nbytes
    bytes_moved = packed[0].bytes + small
    return {
        "dense_us": round(1e6 * dense_seconds, 2),
        "packed_us": round(1e6 * tried[best], 2),
        "ratio": round(dense_seconds / tried[best], 3),
        "bound": round((packed[0].dense_bytes + small) / bytes_moved, 3),
        "packed_gb": round(bytes_moved / tried[best] / 1e9, 1),
        "share_of_copy": round(bytes_moved / tried[best] / 1e9 / copy_gb, 3),
        "relative_error": float((ours.float() - wanted.float()).norm() / wanted.float().norm()),
        "program": program,
        "launch": vars(best) if program else None,
        **({"tried_us": {str(vars(k)): round(1e6 * v, 2) for k, v in tried.items()}} if len(tried) > 1 else {}),
    }


def default(program: str | None, packed: PackedWeight, batch: int) -> Any:
    """The form of the program that a layer launches."""
    return by_cuda.Launch.of(packed) if program == "cuda" else by_triton.Launch.of(batch)


def multiply(packed: list[PackedWeight], x: Tensor, program: str | None, launched: Any) -> Callable[[], list[Tensor]]:
    """A call that multiplies `x` by every weight, by the program if there is one."""
    if program:
        product = (by_cuda if program == "cuda" else by_triton).product
        return lambda: [product(weight, x, launch=launched) for weight in packed]
    return lambda: [plain_product(weight, x) for weight in packed]


def generations(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of figures: tokens a second of generation, packed and dense, for every pattern and batch."""
    for pattern in [None] if args.packed else args.pattern:
        model = load_packed(args.packed, args.device) if args.packed else random_packed(args, pattern)
        layers = packed_layers(model)
        sizes = sum(layer.packed.bytes for layer in layers.values())
        packed = {batch: generated(model, batch, args) for batch in args.batch}
        unpack_all(model, layers)
        for batch, (speed, tokens) in packed.items():
            dense_speed, dense_tokens = generated(model, batch, args)
            shown = str(pattern or next(iter(layers.values())).pattern)
            yield said(
                {
                    "model": args.packed.name if args.packed else args.shape,
                    **{"pattern": shown, "batch": batch, "packed_layers_bytes": sizes, "layers": len(layers)},
                    "dense_tokens_per_second": round(dense_speed, 1),
                    "packed_tokens_per_second": round(speed, 1),
                    "ratio": round(speed / dense_speed, 3),
                    "bound_of_layers": round(1 / packed_share(pattern or next(iter(layers.values())).pattern), 3),
                    "equal_tokens": round(float((tokens == dense_tokens).float().mean()), 3),
                }
            )
        del model, layers
        gc.collect()


def random_packed(args: argparse.Namespace, pattern: Pattern) -> nn.Module:
    """A random bfloat16 model of the shape, whose prunable layers are packed."""
    bundle = random_model(args.shape, args.blocks, torch.bfloat16, args.device)
    for name, layer in bundle.layers.items():
        weight = layer.read()
        mask = pattern.top(weight.abs())
        layer.write(weight.masked_fill(~mask, 0.0))
        bundle.model.set_submodule(name, PackedLinear.of(layer.module, pattern, mask))
    return bundle.model


def unpack_all(model: nn.Module, layers: dict[str, PackedLinear]) -> None:
    """Replace every packed layer by a dense one with the same weight."""
    for name, layer in layers.items():
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        dense.weight = nn.Parameter(layer.weight.contiguous(), requires_grad=False)
        if layer.bias is not None:
            dense.bias = nn.Parameter(layer.bias, requires_grad=False)
        model.set_submodule(name, dense)


def generated(model: Any, batch: int, args: argparse.Namespace) -> tuple[float, Tensor]:
    """Tokens a second of greedy generation after a short prompt, and the tokens `[batch, steps]`."""
    prompt, cache = 8, StaticCache(config=model.config, max_cache_len=8 + args.tokens + 8)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(args.device)
    position = torch.arange(prompt, device=args.device)
    token = stepped(model, tokens, position, cache)
    position = position[-1:] + 1
    history = torch.zeros(batch, prompt + args.tokens + 8, dtype=torch.int64, device=args.device)

    def step() -> None:
        token.copy_(stepped(model, token, position, cache))
        history.index_copy_(1, position, token)
        position.add_(1)

    run = graph_of(step).replay if args.device.type == "cuda" else step
    spent = sum(seconds(run, args.tokens, args.device, warm_up=0))
    first = prompt + (3 if args.device.type == "cuda" else 0)  # steps that warmed the graph up
    return batch * args.tokens / spent, history[:, first : first + args.tokens].cpu()


def stepped(model: Any, tokens: Tensor, position: Tensor, cache: StaticCache) -> Tensor:
    """The most probable next token `[batch, 1]` after `tokens` `[batch, n]` at `position` `[n]`."""
    names = inspect.signature(model.forward).parameters
    options = {"cache" if "cache" in names else "past_key_values": cache, "position_ids": position[None]}
    if "cache_position" in names:  # of older versions of transformers
        options["cache_position"] = position
    logits = model(input_ids=tokens, use_cache=True, **options).logits
    return logits[:, -1:].argmax(dim=-1)


if __name__ == "__main__":
    main()
