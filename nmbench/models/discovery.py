"""The decoder blocks and prunable weights of a model, derived from its module tree or supplied by the model source.

No architecture is known by name. The decoder stack is the outermost `ModuleList` that holds the most prunable weights,
in the part of the model that transformers names as the decoder if it names one. Prunable are linear layers, `nn.Linear`
`[out, in]` and `Conv1D` `[in, out]`, and fused experts (`nmbench.models.fused_experts`). Routers stay dense
(`nmbench.models.routers`). A model source may pass another `Anatomy` to `Bundle.of`, for example
`dataclasses.replace(nmbench.anatomy_of(model, ref), blocks=...)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nmbench.errors import NMBenchError
from nmbench.models.fused_experts import FusedExperts, fused_experts
from nmbench.models.routers import LINEAR as LINEAR
from nmbench.models.routers import routers_of


@dataclass(frozen=True)
class Weight:
    """One prunable weight: the parameter `parameter` of the sub-module `module`, or one `expert` of fused experts.

    `transposed`: the model stores it as `[in, out]`, as GPT-2's Conv1D, instead of `[out, in]`.
    """

    module: str
    parameter: str = "weight"
    expert: int | None = None
    transposed: bool = False

    @property
    def stored(self) -> str:
        """The name of the parameter in the model."""
        return f"{self.module}.{self.parameter}"

    @property
    def name(self) -> str:
        """The name of the layer: `model.layers.0.mlp.up_proj`, `model.layers.0.mlp.experts.down_proj[3]`."""
        if self.expert is not None:
            return f"{self.stored}[{self.expert}]"
        return self.module if self.parameter == "weight" else self.stored

    def view(self, parameter: Tensor) -> Tensor:
        """Return the canonical view `[out, in]` of the weight in `parameter`, the tensor that stores it."""
        weight = parameter if self.expert is None else parameter[self.expert]
        return weight.t() if self.transposed else weight


@dataclass(frozen=True)
class Anatomy:
    """The decoder `blocks` by name, in the order of execution, and the prunable `weights` inside them.

    `skipped`: parameter name of every other matrix -> the reason why it stays dense.
    """

    blocks: tuple[str, ...]
    weights: tuple[Weight, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)


def anatomy_of(model: nn.Module, ref: str) -> Anatomy:
    """Derive the anatomy of `model` from its module tree; `ref` names the model in errors.

    Raises `NMBenchError` if the model has no decoder stack.
    """
    blocks = find_blocks(model, ref)
    weights: list[Weight] = []
    skipped: dict[str, str] = {}
    for block in blocks:
        found, left = weights_of(block, model.get_submodule(block))
        weights += found
        skipped.update(left)
    if not weights:
        raise NMBenchError(f"model {ref} has no linear layer with a weight of its own in its blocks: nothing to prune.")
    inside = tuple(f"{name}." for name in blocks)
    for name, module in model.named_modules():
        if not f"{name}.".startswith(inside):
            skipped.update(matrices(name, module, "outside the decoder blocks"))
    return Anatomy(blocks, tuple(weights), skipped)


def find_blocks(model: nn.Module, ref: str) -> tuple[str, ...]:
    """Return the names of the decoder blocks: the outermost `ModuleList` of the text decoder with the most weights.

    Raises `NMBenchError` if no `ModuleList` has any.
    """
    inside = {id(module) for module in text_decoder(model).modules()}
    every = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    stacks = {name: module for name, module in every.items() if id(module) in inside and prunable_weights(module)}
    stacks = stacks or every
    sizes = {name: prunable_weights(module) for name, module in stacks.items()}
    if not any(sizes.values()):
        raise NMBenchError(f"model {ref} has no stack of decoder blocks with linear layers: nothing to prune.")
    best = max(sizes, key=lambda name: sizes[name])  # of two nested lists with equal counts, the outer one comes first
    return tuple(f"{best}.{index}" if best else str(index) for index in range(len(stacks[best])))


def text_decoder(model: nn.Module) -> nn.Module:
    """Return the part of a model that transformers names as its decoder, else the model.

    A model of images and text may have more weights in the stack that reads the images.
    """
    named = model.get_decoder() if isinstance(model, PreTrainedModel) else None
    return named if isinstance(named, nn.Module) else model


def prunable_weights(stack: nn.Module) -> int:
    """Return the number of weights in the linear layers and fused experts of a stack of blocks."""
    linear = (m.weight.numel() for m in stack.modules() if isinstance(m, LINEAR))
    experts = filter(None, map(fused_experts, stack.modules()))
    return sum(linear) + sum(p.numel() for fused in experts for p in fused.parameters.values())


def weights_of(block_name: str, block: nn.Module) -> tuple[list[Weight], dict[str, str]]:
    """Return the prunable weights of one block, and its other matrices: parameter name -> reason why it stays dense."""
    weights: list[Weight] = []
    skipped: dict[str, str] = {}
    first: dict[int, str] = {}
    routers = routers_of(block)
    for name, module in named_below(block_name, block):
        if (same := first.setdefault(id(module), name)) != name:
            skipped.update(matrices(name, module, f"the same module as {same}"))
        elif isinstance(module, LINEAR) and not module.weight.numel():
            skipped.update(matrices(name, module, "has no weights"))
        elif isinstance(module, LINEAR) and "weight" not in dict(module.named_parameters(recurse=False)):
            skipped.update(matrices(name, module, "its weight is computed from other parameters"))
        elif isinstance(module, LINEAR) and id(module) in routers:
            skipped.update(matrices(name, module, "chooses among experts"))
        elif isinstance(module, LINEAR):
            weights.append(Weight(name, transposed=isinstance(module, Conv1D)))
        else:
            fused = fused_experts(module)
            found = [] if fused is None else experts_of(name, fused)
            weights += found
            others = matrices(name, module, f"not a linear layer but {type(module).__name__}")
            stored = {weight.stored for weight in found}
            skipped.update({n: reason for n, reason in others.items() if n not in stored})
    return weights, skipped


def experts_of(name: str, fused: FusedExperts) -> list[Weight]:
    """Return the weights of the fused experts of the module `name`, one for each expert and parameter."""
    numbers = range(fused.number)
    return [Weight(name, parameter, expert, fused.transposed) for parameter in fused.parameters for expert in numbers]


def named_below(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_modules(remove_duplicate=False):
        yield (f"{prefix}.{name}" if name else prefix), child


def matrices(name: str, module: nn.Module, reason: str) -> dict[str, str]:
    """Return a module's own parameters of two or more dimensions: parameter name -> `reason` and shape."""
    own = module.named_parameters(recurse=False)
    prefix = f"{name}." if name else ""
    return {f"{prefix}{p}": f"{reason} {tuple(value.shape)}" for p, value in own if value.dim() >= 2}
