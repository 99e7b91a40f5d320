"""One product in other forms than torch's own: rows by cuSPARSELt, and FP8 dense and 2:4."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nmbench.errors import first_line
from nmbench.runtime.sparse24 import Product
from nmbench.runtime.sparse24.forms import CUSPARSELT, FP8, FP8_CUSPARSELT, FP8_CUTLASS, SEARCHED
from nmbench.speed.hardware import Hardware
from nmbench.speed.pruning import difference, most_error, product_call
from nmbench.speed.report import Alternative
from nmbench.speed.times import Times

PREFILL_TOKENS = 128  # from which a product is one of a prefill
DECODE_FORMS = (FP8, FP8_CUTLASS)  # which need no library that is slow to launch
FORMS = (CUSPARSELT, SEARCHED, *DECODE_FORMS, FP8_CUSPARSELT)
WARM_UP, REPEAT = 5, 30


def alternatives(inputs: Tensor, weight: Tensor, pruned: Tensor, hardware: Hardware) -> list[Alternative]:
    """Time inputs `[tokens, in]` times a weight in other forms; FP8 includes the rounding of inputs.

    Dense forms multiply `weight`, sparse ones `pruned`. Few tokens have FP8 alone.
    """
    names = FORMS if len(inputs) >= PREFILL_TOKENS else DECODE_FORMS
    return [alternative(name, inputs, weight if name == FP8 else pruned, hardware) for name in names]


def alternative(name: str, inputs: Tensor, weight: Tensor, hardware: Hardware) -> Alternative:
    """Time one form, or give the reason why there is none. A wrong product is not timed."""
    form = hardware.form(name)
    if isinstance(form, str):
        return Alternative(name, problem=form)
    try:
        call = applied(form(weight, None), inputs)
        error = difference(call(), product_call(inputs, weight)())
        if not error <= most_error(name):
            return Alternative(name, problem=f"wrong: its product differs by {error:.3g}, relative")
        return Alternative(
            name,
            times=Times.of(hardware.times(call, WARM_UP, REPEAT)),
            launch=hardware.launch(call),
            relative_error=error,
            kernels=hardware.kernels(call),
        )
    except RuntimeError as refused:  # a library or a device without the product
        return Alternative(name, problem=first_line(refused))


def applied(product: Product, inputs: Tensor) -> Callable[[], Tensor]:
    """Return a call of a product with inputs."""

    @torch.inference_mode()
    def call() -> Tensor:
        return product(inputs)

    return call
