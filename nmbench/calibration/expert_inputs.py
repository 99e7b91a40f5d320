"""What fused experts are given: heard at the matrix products themselves.

transformers 5 stores the experts of a mixture as one parameter `[experts, out, in]` and computes with it in a loop over
experts, in grouped or in batched products, as its configuration says. No module hook can see what one expert is given,
least of all what its down projection is given. But each of those ways ends in one of a few products of PyTorch, one
factor of which is a view of the parameter, or rows picked from it; the other factor is what the experts are given.

Where the first tokens of windows are left out, the module is run a second time, without them, and that is listened to.
What an expert is given in the dense model is what it would be given there for the tokens that are routed to it here.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nmbench.calibration.expert_routing import INTEGERS, Arguments, routed_alike, to_expert, without_first
from nmbench.calibration.statistics import Skip
from nmbench.errors import NMBenchError
from nmbench.models.discovery import Weight
from nmbench.models.hooks import instead

FACTORS = {  # the positions of both factors of a product
    "aten::mm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::bmm": (0, 1),
    "aten::baddbmm": (1, 2),
    "aten::_grouped_mm": (0, 1),
    "transformers::grouped_mm_fallback": (0, 1),
}
Tell = Callable[[Tensor], None]


class ExpertEar(NamedTuple):
    """Tells `tell` the inputs `[tokens, in]` of one fused expert, `weight`, which `module` holds; and, just before,
    `tell_dense` the same of the dense `twin` of the module, which is run on the same windows first.
    """

    module: nn.Module
    weight: Weight
    tell: Tell
    twin: nn.Module | None = None
    tell_dense: Tell | None = None


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
def hearing(ears: Iterable[ExpertEar], skip: Skip | None = None, rerouted: bool = False) -> Iterator[None]:
    """While the context is open, the ears hear what the experts are given; `skip` leaves out first tokens.

    If `rerouted`, they hear instead what their experts would be given if every token were routed to them. What modules
    return is as ever. Raises `NMBenchError` in the forward pass if a module computes with its experts, or is told of
    their routing, in a way that is not understood.
    """
    with contextlib.ExitStack() as stack:
        for listener in listeners(ears, skip or Skip()):
            if listener.twin is not None:
                stack.enter_context(instead(listener.twin, listener.remember))
            stack.enter_context(instead(listener.module, listener.reroute if rerouted else listener.listen))
        yield


def listeners(ears: Iterable[ExpertEar], skip: Skip) -> list[Listener]:
    """The ears gathered by module."""
    by_module: dict[int, list[ExpertEar]] = {}
    for ear in ears:
        by_module.setdefault(id(ear.module), []).append(ear)
    return [Listener(group, skip) for group in by_module.values()]


def fused_of(module: nn.Module, tells: Iterable[tuple[Weight, Tell]]) -> list[Fused]:
    """Who is told of which experts of a module, by parameter."""
    by_parameter: dict[tuple[str, str, bool], dict[int, Tell]] = {}
    for weight, tell in tells:
        assert weight.expert is not None
        by_parameter.setdefault((weight.stored, weight.parameter, weight.transposed), {})[weight.expert] = tell
    return [Fused(name, module.get_parameter(p), t, who) for (name, p, t), who in by_parameter.items()]


class Listener:
    """Stands in for the forward of one module with fused experts, and that of its dense twin, and listens."""

    def __init__(self, ears: Sequence[ExpertEar], skip: Skip) -> None:
        self.module, self.twin, self.skip = ears[0].module, ears[0].twin, skip
        self.forward = self.module.forward
        self.dense_forward = self.twin.forward if self.twin is not None else None
        self.fused = fused_of(self.module, [(ear.weight, ear.tell) for ear in ears])
        both = [(ear.weight, ear.tell_dense) for ear in ears if ear.tell_dense is not None]
        self.dense_fused = fused_of(self.twin, both) if self.twin is not None else []
        self.dense: list[Arguments] = []  # what the twin was called with, until its counterpart comes

    def remember(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the twin."""
        assert self.dense_forward is not None
        self.dense.append(Arguments(args, kwargs))
        return self.dense_forward(*args, **kwargs)

    def listen(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module."""
        arguments = Arguments(args, kwargs)
        if not self.skip.tokens and self.twin is None:
            return self._hear(self.forward, self.fused, arguments)
        result = self.forward(*args, **kwargs)
        dense = routed_alike(self.dense.pop(0), arguments) if self.twin is not None else None
        if self.twin is not None and dense is None:
            raise no_counterpart()
        self._hear_both(self.fused, self.dense_fused, arguments, dense)
        return result

    def reroute(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module, which is then run again for every expert listened to, on all tokens."""
        result = self.forward(*args, **kwargs)
        arguments, beside = Arguments(args, kwargs), self.dense.pop(0) if self.twin is not None else None
        for expert in sorted({expert for one in self.fused for expert in one.tells}):
            forced = to_expert(arguments, expert)
            if forced is None:
                raise unreachable(self.fused[0].name)
            dense = routed_alike(beside, forced) if beside is not None else None
            self._hear_both(only(expert, self.fused), only(expert, self.dense_fused), forced, dense)
        return result

    def _hear_both(
        self, fused: Sequence[Fused], dense_fused: Sequence[Fused], arguments: Arguments, dense: Arguments | None
    ) -> None:
        if dense is not None and self.dense_forward is not None:
            self._hear(self.dense_forward, dense_fused, without_first(dense, self.skip))
        self._hear(self.forward, fused, without_first(arguments, self.skip))

    def _hear(self, forward: Callable[..., Any], fused: Sequence[Fused], arguments: Arguments) -> Any:
        with Products(fused) as products:
            result = forward(*arguments.args, **arguments.kwargs)
        tokens = sum(value.numel() for value in arguments.values if isinstance(value, Tensor))
        silent = [one.name for one in fused if one.name not in products.met]
        if silent and tokens:
            how = f" (it computes with {', '.join(sorted(products.strange))})" if products.strange else ""
            raise NMBenchError(
                f"{type(self.module).__name__} does not show what the experts of {silent[0]} are given{how}; load the "
                f"model with experts_implementation='eager', or leave them dense with --skip {silent[0]!r}."
            )
        return result


def only(expert: int, fused: Iterable[Fused]) -> list[Fused]:
    return [one._replace(tells={expert: one.tells[expert]}) for one in fused if expert in one.tells]


def unreachable(name: str) -> NMBenchError:
    return NMBenchError(
        f"no calibration token reached one of the experts of {name}, and how to send tokens there is unknown; give "
        f"more --windows, or leave them dense with --skip {name!r}."
    )


def no_counterpart() -> NMBenchError:
    return NMBenchError(
        "fused experts whose routing is unknown have no counterpart in the dense model; choose a method, or options, "
        "that do not need the drift of inputs, or leave them dense with --skip."
    )


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
