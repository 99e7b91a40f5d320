"""Keeps one job from leaking into the next: random state, default dtype, gradient mode, matrix precision."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def fenced() -> Iterator[None]:
    """Restore every global that a careless plugin may change, so that the order of methods cannot matter."""
    python, numpy, dtype = random.getstate(), np.random.get_state(), torch.get_default_dtype()
    gradients, precision = torch.is_grad_enabled(), torch.get_float32_matmul_precision()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_default_dtype(dtype)
            torch.set_grad_enabled(gradients)
            torch.set_float32_matmul_precision(precision)
