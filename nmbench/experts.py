"""What fused experts are given: heard at the matrix products themselves.

transformers 5 stores the experts of a mixture as one parameter `[experts, out, in]` and computes with it in a loop over
experts, in grouped or in batched products, as its configuration says. No module hook can see what one expert is given,
least of all what its down projection is given. But each of those ways ends in one of a few products of PyTorch, one
factor of which is a view of the parameter, or rows picked from it; the other factor is what the experts are given.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nmbench.anatomy import Weight
from nmbench.errors import NMBenchError

FACTORS = {  # the positions of both factors of a product
    "aten::mm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::bmm": (0, 1),
    "aten::baddbmm": (1, 2),
    "aten::_grouped_mm": (0, 1),
    "transformers::grouped_mm_fallback": (0, 1),
}
INTEGERS = (torch.int64, torch.int32)
Tell = Callable[[Tensor], None]


class ExpertEar(NamedTuple):
    """Tells `tell` the inputs `[tokens, in]` of one fused expert, `weight`, which `module` holds."""

    module: nn.Module
    weight: Weight
    tell: Tell


class Fused(NamedTuple):
    """One parameter `[experts, ...]` of fused experts and who is told of which expert."""

    name: str
    parameter: Tensor
    transposed: bool
    tells: Mapping[int, Tell]


class Picked(NamedTuple):
    """Where a factor comes from: the `experts` of `fused` that it holds one after the other."""

    fused: Fused
    experts: Sequence[int]


@contextlib.contextmanager
def hearing(ears: Iterable[ExpertEar]) -> Iterator[None]:
    """While the context is open, the ears hear what the experts are given.

    Raises `NMBenchError` in the forward pass if a module computes with its experts in a way that is not understood.
    """
    with contextlib.ExitStack() as stack:
        for module, fused in fused_by_module(ears):
            stack.enter_context(instead(module, heard(module.forward, module, fused)))
        yield


@contextlib.contextmanager
def instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While the context is open, `forward` stands in for the forward of a module."""
    table = vars(module)
    before = table.get("forward")
    table["forward"] = forward
    try:
        yield
    finally:
        del table["forward"]
        if before is not None:
            table["forward"] = before


def fused_by_module(ears: Iterable[ExpertEar]) -> list[tuple[nn.Module, list[Fused]]]:
    """The ears gathered by module and parameter."""
    modules: dict[int, nn.Module] = {}
    tells: dict[int, dict[tuple[str, str, bool], dict[int, Tell]]] = {}
    for module, weight, tell in ears:
        assert weight.expert is not None
        modules[id(module)] = module
        key = (weight.stored, weight.parameter, weight.transposed)
        tells.setdefault(id(module), {}).setdefault(key, {})[weight.expert] = tell
    return [
        (modules[number], [Fused(name, modules[number].get_parameter(p), t, who) for (name, p, t), who in told.items()])
        for number, told in tells.items()
    ]


def heard(forward: Callable[..., Any], module: nn.Module, fused: Sequence[Fused]) -> Callable[..., Any]:
    """The forward of a module that holds `fused` experts, listened to."""

    def listened(*args: Any, **kwargs: Any) -> Any:
        with Products(fused) as products:
            result = forward(*args, **kwargs)
        tokens = sum(value.numel() for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        silent = [one.name for one in fused if one.name not in products.met]
        if silent and tokens:
            how = f" (it computes with {', '.join(sorted(products.strange))})" if products.strange else ""
            raise NMBenchError(
                f"{type(module).__name__} does not show what the experts of {silent[0]} are given{how}; load the model "
                f"with experts_implementation='eager', or leave them dense with --skip {silent[0]!r}."
            )
        return result

    return listened


class Products(TorchDispatchMode):
    """Hears all matrix products with fused experts: `met` those parameters that took part in one, `strange` the other
    operations on them.
    """

    def __init__(self, fused: Iterable[Fused]) -> None:
        super().__init__()
        self.fused = {one.parameter.untyped_storage().data_ptr(): one for one in fused}
        self.picked: dict[int, tuple[Tensor, Picked]] = {}  # by address; the tensor is kept, so that it stays its own
        self.met: set[str] = set()
        self.strange: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in FACTORS:
            offsets = args[2] if name not in ("aten::addmm", "aten::baddbmm") and len(args) > 2 else kwargs.get("offs")
            left, right = FACTORS[name]
            self._product(args[left], args[right], offsets)
        result = func(*args, **kwargs)
        if name not in FACTORS:
            self._other(name, args, result)
        return result

    def _product(self, left: Tensor, right: Tensor, offsets: Tensor | None) -> None:
        for weight, inputs in ((right, left), (left.mT, right.mT)):  # [..., in, out] and [..., tokens, in]
            picked = self._found(weight)
            if picked is not None and starts_with_a_row(weight, picked):
                check_layout(weight, picked.fused)
                self.met.add(picked.fused.name)
                tell(picked, inputs, offsets)

    def _found(self, weight: Tensor) -> Picked | None:
        """Which experts a factor `[..., in, out]` holds, or None if it is something else."""
        address = weight.untyped_storage().data_ptr()
        if address in self.picked:
            return self.picked[address][1]
        fused = self.fused.get(address)
        if fused is None:
            return None
        first = (weight.storage_offset() - fused.parameter.storage_offset()) // fused.parameter.stride(0)
        return Picked(fused, range(first, first + (len(weight) if weight.dim() == 3 else 1)))

    def _other(self, name: str, args: Any, result: Any) -> None:
        """Note copies of some experts, and anything else that is done to them."""
        sources = [a for a in args if isinstance(a, Tensor) and a.untyped_storage().data_ptr() in self.fused]
        if not sources or not isinstance(result, Tensor):
            return
        source = sources[0]
        if result.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
            return  # a view
        fused = self.fused[source.untyped_storage().data_ptr()]
        whole = source.shape == fused.parameter.shape and source.stride() == fused.parameter.stride()
        experts = picked_experts(name, args) if whole else None
        if experts is None:
            self.strange.add(name)
        else:
            self.picked[result.untyped_storage().data_ptr()] = (result, Picked(fused, experts))


def picked_experts(name: str, args: Sequence[Any]) -> list[int] | None:
    """Which experts an operation copies out of their parameter one after the other, or None if it does not."""
    indices: Any = None
    if name == "aten::index" and len(args[1]) == 1:
        indices = args[1][0]
    elif name == "aten::index_select" and args[1] == 0:
        indices = args[2]
    usual = isinstance(indices, Tensor) and indices.dim() == 1 and indices.dtype in INTEGERS
    return indices.tolist() if usual else None


def starts_with_a_row(weight: Tensor, picked: Picked) -> bool:
    """Whether a factor begins where an expert does: other rows of it in other products are given the same inputs."""
    stored = picked.fused.parameter
    if weight.untyped_storage().data_ptr() != stored.untyped_storage().data_ptr():
        return weight.storage_offset() == 0
    return (weight.storage_offset() - stored.storage_offset()) % stored.stride(0) == 0


def check_layout(weight: Tensor, fused: Fused) -> None:
    """Raise `NMBenchError` unless a factor `[..., in, out]` runs along the inputs where they are said to be."""
    inputs, outputs = (1, 2) if fused.transposed else (2, 1)
    long = min(fused.parameter.shape[1:]) > 1
    along = weight.stride()[-2:] == (fused.parameter.stride(inputs), fused.parameter.stride(outputs))
    if weight.shape[-2] != fused.parameter.shape[inputs] or (long and not along):
        raise NMBenchError(
            f"the experts of {fused.name} {tuple(fused.parameter.shape)} are not stored as [experts, "
            f"{'in, out' if fused.transposed else 'out, in'}]; the model source must tell by an Anatomy of its own."
        )


def tell(picked: Picked, inputs: Tensor, offsets: Tensor | None) -> None:
    """Hand every expert its inputs `[tokens, in]` out of those of a product."""
    tells = picked.fused.tells
    if offsets is not None:  # rows of one expert after the other, up to its offset
        for expert, (start, stop) in zip(picked.experts, itertools.pairwise([0, *offsets.tolist()]), strict=True):
            if expert in tells and stop > start:
                tells[expert](inputs[start:stop])
    elif inputs.dim() == 2:
        if picked.experts[0] in tells and len(inputs):
            tells[picked.experts[0]](inputs)
    else:
        chosen = torch.tensor(picked.experts)
        for expert in chosen.unique().tolist():
            if expert in tells:
                tells[expert](inputs[(chosen == expert).to(inputs.device)].flatten(0, 1))


@contextlib.contextmanager
def rerouted(ears: Iterable[ExpertEar]) -> Iterator[None]:
    """While the context is open, the ears hear what their experts would be given if every token were routed to them.

    What the module returns is as ever. Raises `NMBenchError` in the forward pass if it is not told of a routing
    `[tokens, choices]` of integers.
    """
    with contextlib.ExitStack() as stack:
        for module, fused in fused_by_module(ears):
            stack.enter_context(instead(module, also_rerouted(module.forward, module, fused)))
        yield


def also_rerouted(forward: Callable[..., Any], module: nn.Module, fused: Sequence[Fused]) -> Callable[..., Any]:
    """The forward of a module which is then run again for every expert listened to, on all tokens."""
    experts = sorted({expert for one in fused for expert in one.tells})

    def twice(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        for expert in experts:
            told = [one._replace(tells={expert: one.tells[expert]}) for one in fused if expert in one.tells]
            forced, named = routed_to(expert, args, kwargs, told[0].name)
            heard(forward, module, told)(*forced, **named)
        return result

    return twice


def routed_to(
    expert: int, args: Sequence[Any], kwargs: Mapping[str, Any], name: str
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of an experts module that send every token to one expert, once."""
    routings = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dtype in INTEGERS and v.dim() == 2]
    if len(routings) != 1:
        raise NMBenchError(
            f"no calibration token reached one of the experts of {name}, and how to send tokens there is unknown; give "
            f"more --windows, or leave them dense with --skip {name!r}."
        )

    def forced(value: Any) -> Any:
        if value is routings[0]:
            return torch.full_like(value[:, :1], expert)
        return value[:, :1] if isinstance(value, Tensor) and value.shape == routings[0].shape else value

    return [forced(value) for value in args], {key: forced(value) for key, value in kwargs.items()}
