"""Products with a weight on tensor cores: dense and 2:4, in half precision and in FP8. Each is a `Form`.

Sparse forms take weights that are already 2:4. All return contiguous rows `[tokens, out]`: `F.linear` with torch's
sparse tensors returns a transposed view in some releases of torch, on which all that follows in a model is slow. Inputs
are rounded to FP8 inside the product. The operators are those of torch 2.11 and torchao 0.17 and later.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nmbench.runtime.sparse24.linear import Form, Product
from nmbench.runtime.sparse24.quantise import quantised, quantised_rows

MULTIPLES = (32, 64)  # of rows and columns that every sparse form multiplies
TOKENS = 16  # of which a multiple is multiplied by cuSPARSELt; the rest is padded
CUTLASS = "torchao::to_sparse_semi_structured_cutlass_sm9x_f8"


def dense(weight: Tensor, bias: Tensor | None) -> Product:
    """`F.linear` with a dense weight."""
    return lambda inputs: F.linear(inputs, weight, bias)


def torch_sparse(weight: Tensor, bias: Tensor | None) -> Product:
    """`F.linear` with torch's own tensor of a 2:4 weight."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*prototype stage.*")
        sparse = torch.sparse.to_sparse_semi_structured(weight)
    return lambda inputs: F.linear(inputs, sparse, bias)


def cusparselt(weight: Tensor, bias: Tensor | None) -> Product:
    """cuSPARSELt by torch's operator, without the tensor subclass; outputs are transposed inside the product."""
    packed = torch._cslt_compress(weight)

    def product(inputs: Tensor) -> Tensor:
        rows = padded(inputs)
        return torch._cslt_sparse_mm(packed, rows.t(), bias=bias, transpose_result=True)[: len(inputs)]

    return product


def cusparselt_searched(weight: Tensor, bias: Tensor | None) -> Product:
    """`cusparselt` with the fastest of its algorithms, searched for at the first product of each shape."""
    packed, shape = torch._cslt_compress(weight), (*weight.shape, weight.dtype)

    def product(inputs: Tensor) -> Tensor:
        rows = padded(inputs)
        key = (*shape, len(rows), bias is None)
        if key not in SEARCHES:
            SEARCHES[key] = search(packed, rows, bias)
        return torch._cslt_sparse_mm(packed, rows.t(), bias=bias, transpose_result=True, alg_id=SEARCHES[key])[
            : len(inputs)
        ]

    return product


SEARCHES: dict[Any, int] = {}  # shape, dtype, tokens and bias -> the fastest algorithm in this process


def search(packed: Tensor, rows: Tensor, bias: Tensor | None) -> int:
    """Return the number of cuSPARSELt's fastest algorithm; its split of sums is left as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the search deprecated; its successor is private
        return int(torch._cslt_sparse_mm_search(packed, rows.t(), bias=bias, transpose_result=True))


def fp8(weight: Tensor, bias: Tensor | None) -> Product:
    """Dense FP8, one scale per row of the weight and per token (`torch._scaled_mm`)."""
    rounded, scale = quantised_rows(weight)
    columns, scales = rounded.t(), scale.t()

    def product(inputs: Tensor) -> Tensor:
        rows, own = quantised_rows(inputs)
        return torch._scaled_mm(rows, columns, own, scales, bias=bias, out_dtype=inputs.dtype, use_fast_accum=True)

    return product


def fp8_cutlass(weight: Tensor, bias: Tensor | None) -> Product:
    """2:4 FP8 by CUTLASS, the operators behind torchao's sparse FP8 tensor; scales as in `fp8`."""
    operators = torch.ops.torchao
    rounded, scale = quantised_rows(weight)
    packed, places = operators.to_sparse_semi_structured_cutlass_sm9x_f8(rounded)
    scales = scale.squeeze(1)

    def product(inputs: Tensor) -> Tensor:
        rows, own = quantised_rows(inputs)
        return operators.rowwise_scaled_linear_sparse_cutlass_f8f8(
            rows, own.squeeze(1), packed, places, scales, bias, inputs.dtype
        )

    return product


def fp8_cusparselt(weight: Tensor, bias: Tensor | None) -> Product:
    """2:4 FP8 by cuSPARSELt: one scale per row of the weight, and one for all inputs, as the library allows."""
    rounded, scale = quantised_rows(weight)
    packed, scales = torch._cslt_compress(rounded), scale.squeeze(1)

    def product(inputs: Tensor) -> Tensor:
        rows, own = quantised(padded(inputs))
        out = torch._cslt_sparse_mm(
            packed, rows.t(), alpha=scales * own, out_dtype=inputs.dtype, transpose_result=True
        )[: len(inputs)]
        return out if bias is None else out + bias

    return product


def can_multiply(rows: int, columns: int) -> bool:
    """Return True if every sparse form multiplies weights of this shape."""
    return rows % MULTIPLES[0] == 0 == columns % MULTIPLES[1]


def padded(inputs: Tensor) -> Tensor:
    """Return inputs `[tokens, in]`, contiguous, with rows of zeros up to a multiple of `TOKENS`."""
    missing = -len(inputs) % TOKENS
    return F.pad(inputs, (0, 0, 0, missing)) if missing else inputs.contiguous()


def fp8_problem() -> str | None:
    """Return why this machine has no FP8 products, or None."""
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) >= (9, 0):
        return None
    return f"FP8 with a scale per row needs compute capability 9.0; this GPU has {major}.{minor}"


def cutlass_problem() -> str | None:
    """Return why torchao's 2:4 FP8 product cannot run here, or None; loads torchao."""
    if torch.cuda.get_device_capability()[0] != 9:
        return "torchao's 2:4 FP8 product is for compute capability 9.x (H100, H200)"
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed: pip install 'nmbench[fp8]'"
    version = importlib.import_module("torchao").__version__
    if hasattr(torch.ops.torchao, CUTLASS.rpartition(":")[2]) and has_cuda_kernel(CUTLASS):
        return None
    return (
        f"torchao {version} has no 2:4 FP8 kernel for torch {torch.__version__}: 0.17 and later need torch 2.11 or "
        f"later with CUDA 13"
    )


def has_cuda_kernel(operator: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA"))


def cusparselt_problem() -> str | None:
    """Return why torch cannot use cuSPARSELt here, or None."""
    return None if torch.backends.cusparselt.is_available() else f"torch {torch.__version__} has no cuSPARSELt"


def problem_of(name: str) -> str | None:
    """Return why the form `name` of `FORMS` cannot be used on the current device, or None."""
    checks: dict[str, Sequence[Callable[[], str | None]]] = {
        CUSPARSELT: [cusparselt_problem],
        SEARCHED: [cusparselt_problem],
        FP8: [fp8_problem],
        FP8_CUTLASS: [cutlass_problem],
        FP8_CUSPARSELT: [fp8_problem, cusparselt_problem],
    }
    return next(filter(None, (check() for check in checks.get(name, ()))), None)


DENSE, TORCH, CUSPARSELT, SEARCHED = "dense", "2:4 torch", "2:4", "2:4 searched"
FP8, FP8_CUTLASS, FP8_CUSPARSELT = "fp8", "2:4 fp8 CUTLASS", "2:4 fp8 cuSPARSELt"
FORMS: dict[str, Form] = {
    DENSE: dense,
    TORCH: torch_sparse,
    CUSPARSELT: cusparselt,
    SEARCHED: cusparselt_searched,
    FP8: fp8,
    FP8_CUTLASS: fp8_cutlass,
    FP8_CUSPARSELT: fp8_cusparselt,
}
