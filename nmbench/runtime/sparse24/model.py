"""A pruned model made fast for long inputs on NVIDIA's sparse tensor cores."""

from __future__ import annotations

from torch import Tensor, nn

from nmbench.errors import NMBenchError
from nmbench.pattern import Pattern
from nmbench.runtime.sparse24.forms import can_multiply, cusparselt_searched
from nmbench.runtime.sparse24.linear import Form, install, shared_inputs

TWO_FOUR = Pattern(2, 4)


def to_sparse24(
    model: nn.Module, tokens: Tensor | None = None, form: Form = cusparselt_searched, merged: bool = False
) -> int:
    """Replace every `nn.Linear` with a 2:4 weight by a sparse product, in place; return how many were replaced.

    `form` searches for the fastest algorithm of cuSPARSELt at the first product of every shape and number of tokens;
    `forms.cusparselt` takes the library's first one. With `merged`, layers that read the same input share one product;
    `tokens` int64 `[batch, n]` are then read once by the model, to observe which layers do. Layers with other weights,
    or of shapes that cuSPARSELt cannot multiply, stay as they are. Only inference is possible afterwards, and the model
    cannot be saved. Raises `NMBenchError` if no layer is 2:4, or if `merged` has no `tokens`.
    """
    if merged and tokens is None:
        raise NMBenchError(
            "to_sparse24 with merged=True needs tokens, to observe which layers read the same input; give tokens, "
            "int64 [batch, n], or leave merged out."
        )
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and fits(layer)}
    if not layers:
        raise NMBenchError(
            "the model has no linear layer with a 2:4 weight of a shape that cuSPARSELt multiplies; load a model that "
            "was pruned at 2:4, or one exported by `nmbench export`."
        )
    groups = shared_inputs(layers, lambda: model(input_ids=tokens)) if merged else [[name] for name in layers]
    for group in groups:
        install(model, group, [layers[name].weight.detach() for name in group], form)
        for name in group:
            del layers[name]  # the dense weight goes before the next one is converted
    return sum(map(len, groups))


def fits(layer: nn.Linear) -> bool:
    """Return whether a layer's weight is 2:4 and has a shape that cuSPARSELt multiplies."""
    if not can_multiply(*layer.weight.shape):
        return False
    return bool((TWO_FOUR.kept(layer.weight.detach() != 0) <= TWO_FOUR.keep).all())
