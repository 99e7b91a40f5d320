"""The inputs of fused experts, observed at the matrix products themselves.

transformers 5 stores the experts of a mixture as one parameter `[experts, out, in]` and computes with it in a loop over
experts, in grouped or in batched products, as its configuration says. No module hook can see the inputs of one expert,
least of all those of its down projection. But each of these ways ends in one of a few products of PyTorch. One factor
is a view of the parameter, or rows picked from the parameter; the other factor is the inputs of the experts.

Where the first tokens of windows are left out, the module runs a second time without these tokens, and the second run
is observed. The dense inputs of an expert are those of the dense model for the tokens that are routed to the expert in
the pruned model.
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
Callback = Callable[[Tensor], None]


class ExpertObserver(NamedTuple):
    """Calls `callback` with the inputs `[tokens, in]` of one fused expert, `weight` of `module`.

    Just before, `dense_callback` is called with the inputs of the same expert of `dense_module`, the dense copy of the
    module, which runs on the same windows first.
    """

    module: nn.Module
    weight: Weight
    callback: Callback
    dense_module: nn.Module | None = None
    dense_callback: Callback | None = None


class Fused(NamedTuple):
    """One parameter `[experts, ...]` of fused experts, and callbacks by number of the expert."""

    name: str
    parameter: Tensor
    transposed: bool
    callbacks: Mapping[int, Callback]


class Picked(NamedTuple):
    """The origin of a factor: the `experts` of `fused` that it holds one after the other."""

    fused: Fused
    experts: Sequence[int]


@contextlib.contextmanager
def observing_experts(
    observers: Iterable[ExpertObserver], skip: Skip | None = None, rerouted: bool = False
) -> Iterator[None]:
    """While the context is open, the inputs of experts are passed to the observers; `skip` leaves out first tokens.

    If `rerouted`, these are the inputs that an expert would have if every token were routed to the expert. The outputs
    of modules do not change. Raises `NMBenchError` in the forward pass if the products with the experts, or the
    arguments that route tokens, are of an unknown form.
    """
    with contextlib.ExitStack() as stack:
        for forward in forwards_of(observers, skip or Skip()):
            if forward.dense_module is not None:
                stack.enter_context(instead(forward.dense_module, forward.remember))
            stack.enter_context(instead(forward.module, forward.reroute if rerouted else forward.observe))
        yield


def forwards_of(observers: Iterable[ExpertObserver], skip: Skip) -> list[ExpertForward]:
    """The observers gathered by module."""
    by_module: dict[int, list[ExpertObserver]] = {}
    for observer in observers:
        by_module.setdefault(id(observer.module), []).append(observer)
    return [ExpertForward(group, skip) for group in by_module.values()]


def fused_of(module: nn.Module, callbacks: Iterable[tuple[Weight, Callback]]) -> list[Fused]:
    """Callbacks for the experts of a module, by parameter."""
    by_parameter: dict[tuple[str, str, bool], dict[int, Callback]] = {}
    for weight, callback in callbacks:
        assert weight.expert is not None
        by_parameter.setdefault((weight.stored, weight.parameter, weight.transposed), {})[weight.expert] = callback
    return [Fused(name, module.get_parameter(p), t, who) for (name, p, t), who in by_parameter.items()]


class ExpertForward:
    """Replaces the forward of one module with fused experts, and that of its dense copy, to observe inputs."""

    def __init__(self, observers: Sequence[ExpertObserver], skip: Skip) -> None:
        self.module, self.dense_module, self.skip = observers[0].module, observers[0].dense_module, skip
        self.forward = self.module.forward
        self.dense_forward = self.dense_module.forward if self.dense_module is not None else None
        self.fused = fused_of(self.module, [(observer.weight, observer.callback) for observer in observers])
        both = [
            (observer.weight, observer.dense_callback) for observer in observers if observer.dense_callback is not None
        ]
        self.dense_fused = fused_of(self.dense_module, both) if self.dense_module is not None else []
        self.dense: list[Arguments] = []  # arguments of the dense module, until the live module is called

    def remember(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the dense module."""
        assert self.dense_forward is not None
        self.dense.append(Arguments(args, kwargs))
        return self.dense_forward(*args, **kwargs)

    def observe(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module."""
        arguments = Arguments(args, kwargs)
        if not self.skip.tokens and self.dense_module is None:
            return self._observed(self.forward, self.fused, arguments)
        result = self.forward(*args, **kwargs)
        dense = routed_alike(self.dense.pop(0), arguments) if self.dense_module is not None else None
        if self.dense_module is not None and dense is None:
            raise no_counterpart()
        self._observe_both(self.fused, self.dense_fused, arguments, dense)
        return result

    def reroute(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module, which then runs again on all tokens for every observed expert."""
        result = self.forward(*args, **kwargs)
        arguments, beside = Arguments(args, kwargs), self.dense.pop(0) if self.dense_module is not None else None
        for expert in sorted({expert for one in self.fused for expert in one.callbacks}):
            forced = to_expert(arguments, expert)
            if forced is None:
                raise unreachable(self.fused[0].name)
            dense = routed_alike(beside, forced) if beside is not None else None
            self._observe_both(only(expert, self.fused), only(expert, self.dense_fused), forced, dense)
        return result

    def _observe_both(
        self, fused: Sequence[Fused], dense_fused: Sequence[Fused], arguments: Arguments, dense: Arguments | None
    ) -> None:
        if dense is not None and self.dense_forward is not None:
            self._observed(self.dense_forward, dense_fused, without_first(dense, self.skip))
        self._observed(self.forward, fused, without_first(arguments, self.skip))

    def _observed(self, forward: Callable[..., Any], fused: Sequence[Fused], arguments: Arguments) -> Any:
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
    return [one._replace(callbacks={expert: one.callbacks[expert]}) for one in fused if expert in one.callbacks]


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
    """Observes all matrix products with fused experts. `met`: parameters that took part in a product; `strange`: other
    operations on these parameters.
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
                pass_on(picked, inputs, offsets)

    def _found(self, weight: Tensor) -> Picked | None:
        """The experts that a factor `[..., in, out]` holds, or None if the factor is something else."""
        address = weight.untyped_storage().data_ptr()
        if address in self.picked:
            return self.picked[address][1]
        fused = self.fused.get(address)
        if fused is None:
            return None
        first = (weight.storage_offset() - fused.parameter.storage_offset()) // fused.parameter.stride(0)
        return Picked(fused, range(first, first + (len(weight) if weight.dim() == 3 else 1)))

    def _other(self, name: str, args: Any, result: Any) -> None:
        """Note copies of some experts, and every other operation on experts."""
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
    """The experts that an operation copies out of their parameter one after the other, or None if there are none."""
    indices: Any = None
    if name == "aten::index" and len(args[1]) == 1:
        indices = args[1][0]
    elif name == "aten::index_select" and args[1] == 0:
        indices = args[2]
    usual = isinstance(indices, Tensor) and indices.dim() == 1 and indices.dtype in INTEGERS
    return indices.tolist() if usual else None


def starts_with_a_row(weight: Tensor, picked: Picked) -> bool:
    """True if a factor begins with the first row of an expert; other rows of the expert have the same inputs."""
    stored = picked.fused.parameter
    if weight.untyped_storage().data_ptr() != stored.untyped_storage().data_ptr():
        return weight.storage_offset() == 0
    return (weight.storage_offset() - stored.storage_offset()) % stored.stride(0) == 0


def check_layout(weight: Tensor, fused: Fused) -> None:
    """Raise `NMBenchError` unless the inputs of a factor `[..., in, out]` run along the dimension that was declared."""
    inputs, outputs = (1, 2) if fused.transposed else (2, 1)
    long = min(fused.parameter.shape[1:]) > 1
    along = weight.stride()[-2:] == (fused.parameter.stride(inputs), fused.parameter.stride(outputs))
    if weight.shape[-2] != fused.parameter.shape[inputs] or (long and not along):
        raise NMBenchError(
            f"the experts of {fused.name} {tuple(fused.parameter.shape)} are not stored as [experts, "
            f"{'in, out' if fused.transposed else 'out, in'}]; the model source must give an Anatomy of its own."
        )


def pass_on(picked: Picked, inputs: Tensor, offsets: Tensor | None) -> None:
    """Call the callback of every expert with its inputs `[tokens, in]` out of those of a product."""
    callbacks = picked.fused.callbacks
    if offsets is not None:  # rows of one expert after the other, up to its offset
        for expert, (start, stop) in zip(picked.experts, itertools.pairwise([0, *offsets.tolist()]), strict=True):
            if expert in callbacks and stop > start:
                callbacks[expert](inputs[start:stop])
    elif inputs.dim() == 2:
        if picked.experts[0] in callbacks and len(inputs):
            callbacks[picked.experts[0]](inputs)
    else:
        chosen = torch.tensor(picked.experts)
        for expert in chosen.unique().tolist():
            if expert in callbacks:
                rows = inputs[(chosen == expert).to(inputs.device)].flatten(0, 1)
                rows = rows[rows.any(dim=-1)]  # Llama 4 hands every expert all tokens, as zeros if they are not its own
                if len(rows):
                    callbacks[expert](rows)
