"""Engines that an export is written for: what each of them runs, refuses and reads.

Facts about engines that nmbench has not run are from their public code and documentation, and the target's `warning`
says so. `docs/guide/use-your-model.md` lists the versions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn

from nmbench.artifacts.hardware import SLIDING
from nmbench.artifacts.model_files import check_dense, check_packed, edit_config, write_dense, write_packed
from nmbench.errors import NMBenchError, unknown
from nmbench.methods import PrunedModel
from nmbench.models.bundle import Bundle
from nmbench.pattern import Pattern
from nmbench.runtime import dtype_name

PLAIN = "plain"
MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers that vLLM runs as one

Write = Callable[[Bundle, PrunedModel, Mapping[str, Pattern], Path], None]


@dataclass(frozen=True)
class Target:
    """An engine, or a family of engines, that reads one form of folder.

    `refuse_patterns` and `refuse_model` raise `NMBenchError` for what the engine cannot run. `write` makes the files,
    `check` reads them back against the live model. `fills`: the folder shows kept zeros as kept, so that `--exact` has
    nothing to fill. `use` is the text of the model card, `warning` a sentence on what nobody here has tried.
    """

    name: str
    use: str
    warning: str = ""
    fills: bool = False
    write: Write = write_dense
    check: Callable[[Path, nn.Module], None] = check_dense
    refuse_patterns: Callable[[Mapping[str, Pattern]], None] = lambda patterns: None
    refuse_model: Callable[[Bundle], None] = lambda bundle: None


def target_named(name: str) -> Target:
    """Return the target of a name. Raises `UnknownName` for another one, and `NMBenchError` for torchao."""
    if name == "torchao":
        raise NMBenchError(
            "--for torchao: torchao 0.18 has no file format for its 2:4 weights, and makes them on the GPU when a "
            "model is quantised; export --for plain and pass that model to torchao's quantize_ (guide: use your model)."
        )
    found = next((target for target in TARGETS if target.name == name), None)
    if found is None:
        raise unknown("target", name, NAMES)
    return found


def first_other(patterns: Mapping[str, Pattern], runs: Iterable[Pattern]) -> tuple[str, Pattern] | None:
    """Return the first layer with a pattern that is not among `runs`."""
    known = set(runs)
    return next(((name, pattern) for name, pattern in patterns.items() if pattern not in known), None)


def refuse_other_than_2_4(patterns: Mapping[str, Pattern]) -> None:
    if other := first_other(patterns, [Pattern(2, 4)]):
        raise NMBenchError(
            f"--for vllm-0.18: that engine multiplies 2:4 alone, and {other[0]} is {other[1]}; export --for plain or "
            f"--for packed."
        )


def refuse_unlike_slides(patterns: Mapping[str, Pattern]) -> None:
    if other := first_other(patterns, SLIDING):
        raise NMBenchError(
            f"--for slidesparse: that tool slides {', '.join(map(str, SLIDING))}, and {other[0]} is {other[1]}; export "
            f"--for plain or --for packed."
        )
    if other := first_other(patterns, [next(iter(patterns.values()))]):
        raise NMBenchError(
            f"--for slidesparse: that tool converts all layers of a model with one --L, and {other[0]} is {other[1]} "
            f"beside {next(iter(patterns.values()))}; export --for plain."
        )


def refuse_experts(bundle: Bundle, name: str) -> None:
    """Raise `NMBenchError` if some layers are experts in one parameter, which have no linear layer of their own."""
    if expert := next((layer.name for layer in bundle.layers.values() if layer.fused), None):
        raise NMBenchError(f"--for {name}: {expert} is one of several experts in one parameter; export --for plain.")


def refuse_for_packed(bundle: Bundle) -> None:
    refuse_experts(bundle, "packed")
    if name := next((layer.name for layer in bundle.layers.values() if layer.where.parameter != "weight"), None):
        raise NMBenchError(f"--for packed: {name} is not the weight of a linear layer; export --for plain.")
    made = type(bundle.model).__name__
    if not hasattr(transformers, made):
        raise NMBenchError(f"--for packed: {made} is code of the model's own, not of transformers; export --for plain.")


def refuse_for_vllm(bundle: Bundle) -> None:
    refuse_experts(bundle, "vllm-0.18")
    if name := next((layer.name for layer in bundle.layers.values() if layer.transposed), None):
        raise NMBenchError(f"--for vllm-0.18: {name} is stored [in, out], not as a linear layer; export --for plain.")
    if bundle.dtype not in (torch.float16, torch.bfloat16):
        raise NMBenchError(
            f"--for vllm-0.18: that engine multiplies 16-bit weights, not {dtype_name(bundle.dtype)}; add --dtype "
            f"bfloat16."
        )
    dense = dense_linears(bundle)
    for family in MERGED:
        for layer in bundle.layers:
            parent, _, own = layer.rpartition(".")
            if own in family and (left := next((f"{parent}.{o}" for o in family if f"{parent}.{o}" in dense), None)):
                raise NMBenchError(
                    f"--for vllm-0.18: that engine runs {', '.join(family)} as one layer, and {left} is dense beside "
                    f"{layer}; prune all of them or none, or export --for plain."
                )


def dense_linears(bundle: Bundle) -> list[str]:
    """Return the linear layers that are not pruned."""
    return [n for n, m in bundle.model.named_modules() if isinstance(m, nn.Linear) and n not in bundle.layers]


def write_for_vllm(bundle: Bundle, pruned: PrunedModel, patterns: Mapping[str, Pattern], folder: Path) -> None:
    """Write dense weights, and the configuration by which vLLM <= 0.18 compresses them when it loads them."""
    write_dense(bundle, pruned, patterns, folder)
    ignored = dense_linears(bundle)
    sparsity = {"format": "dense", "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": ignored}
    own = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": ignored}
    edit_config(folder, {"quantization_config": {**own, "sparsity_config": sparsity}})


LOAD = (
    "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'model = AutoModelForCausalLM.from_pretrained("this-folder")\n'
    'tokenizer = AutoTokenizer.from_pretrained("this-folder")\n```\n\n'
    "The model is as large as the dense one and, stored like this, as fast: a library has to compress the zeros "
    "away to gain by them. `nmbench validate this-folder` checks the masks again."
)
LOAD_PACKED = (
    "```python\nfrom nmbench.runtime import load_packed\nfrom transformers import AutoTokenizer\n\n"
    'model = load_packed("this-folder", device="cuda")\n'
    'tokenizer = AutoTokenizer.from_pretrained("this-folder")\n```\n\n'
    "The weights stay packed in memory. On an NVIDIA GPU a Triton program multiplies up to 8 tokens at once by the "
    "packed weights; more tokens, and other devices, unpack a layer for each call. `nmbench validate this-folder` "
    "checks the weights again."
)
VLLM = (
    "For vLLM 0.18 and older alone, which compress the weights to 2:4 when they load them (CUTLASS, compute capability "
    "9.0). Newer versions refuse `sparsity_config`: export again with `--for plain` for them."
)
SLIDE = (
    "For SlideSparse (a fork of vLLM): quantise the folder to INT8 or FP8 first, then convert it with its tool: "
    "`weight_convert/slide.py --input FOLDER --Z 2 --L M`, where M is that of N:M."
)
NOT_RUN = "not run by us: the form of the folder follows the engine's public code"

TARGETS = (
    Target(PLAIN, LOAD),
    Target("packed", LOAD_PACKED, "", True, write_packed, check_packed, refuse_model=refuse_for_packed),
    Target(
        "vllm-0.18",
        VLLM,
        f"--for vllm-0.18 is for vLLM 0.18 and older; newer versions refuse this folder ({NOT_RUN})",
        write=write_for_vllm,
        refuse_patterns=refuse_other_than_2_4,
        refuse_model=refuse_for_vllm,
    ),
    Target(
        "slidesparse",
        SLIDE,
        f"--for slidesparse is a plain folder of a pattern that SlideSparse converts, after a quantisation to INT8 or "
        f"FP8 ({NOT_RUN})",
        refuse_patterns=refuse_unlike_slides,
        refuse_model=lambda bundle: refuse_experts(bundle, "slidesparse"),
    ),
)
NAMES = (*(target.name for target in TARGETS), "torchao")
