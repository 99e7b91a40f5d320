"""Sums over tokens of squares and products of inputs, in float32, by the fastest way that the device has.

A product of two bfloat16 or two float16 numbers is exact in float32. The tensor cores of NVIDIA GPUs multiply such
numbers and add the products up in float32. So inputs of these types are not converted to float32 first; the much slower
float32 units would do the product then. Sums are always in float32: the flags of torch for reduced-precision reductions
concern results in bfloat16 or float16, and TF32 concerns float32 inputs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)


def add_squares(sums: Tensor, x: Tensor) -> None:
    """Add the sum of squares of every column of `x` `[tokens, in]`, of any float dtype, to `sums` `[in]` float32."""
    if x.is_cuda and x.dtype in HALVES:
        sums += torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square()  # converts as it reads
    else:
        sums += x.float().square().sum(dim=0)


def add_gram(gram: Tensor, x: Tensor) -> None:
    """Add x^T x to `gram` `[in, in]` float32; `x` `[tokens, in]` of any float dtype."""
    if x.is_cuda and x.dtype in HALVES and len(x):
        halves_rule(x.device, x.dtype)(gram, x)
    else:
        by_conversion(gram, x)


@functools.cache
def halves_rule(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor, Tensor], None]:
    """The first rule that gives the right sum on a device; releases of torch differ in the rules they accept."""
    x = torch.ones(32, 32, dtype=dtype, device=device)
    for rule in (in_place, by_sum):
        gram = torch.ones(32, 32, device=device)
        try:
            rule(gram, x)
        except (RuntimeError, TypeError):  # raised by torch for an unsupported product
            continue
        if bool((gram == 33).all()):
            return rule
    return by_conversion


def in_place(gram: Tensor, x: Tensor) -> None:
    """One product that adds as it writes; a float32 addend is taken by later releases only."""
    torch.addmm(gram, x.t(), x, out_dtype=torch.float32, out=gram)


def by_sum(gram: Tensor, x: Tensor) -> None:
    """A product into float32, and a sum; torch 2.8 and later."""
    gram += torch.mm(x.t(), x, out_dtype=torch.float32)


def by_conversion(gram: Tensor, x: Tensor) -> None:
    """A float32 product."""
    x = x.float()
    gram.addmm_(x.t(), x)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """While the context is open, TF32 is off: a Cholesky factorisation fails on a Gram matrix of 10-bit products."""
    with tf32(allowed=False):
        yield


@contextlib.contextmanager
def tf32(allowed: bool = True) -> Iterator[None]:
    """While the context is open, float32 products on a GPU may round their factors to TF32, 10 bits after the point.

    Such products are several times faster on tensor cores; other devices ignore the context. Contexts nest, and the
    setting before comes back, also after an exception.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
