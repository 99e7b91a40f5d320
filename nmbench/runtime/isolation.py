"""Isolation between jobs: random state, settings of torch, working directory, standard output."""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def isolating() -> Iterator[None]:
    """Restore all global state that a plugin may change when the context ends, so that the order of methods is free.

    Output printed inside the context goes to standard error: standard output is for the table.
    """
    python, numpy, folder = random.getstate(), np.random.get_state(), os.getcwd()
    with torch.random.fork_rng(), contextlib.redirect_stdout(sys.stderr), restoring_torch_settings():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            os.chdir(folder)


@contextlib.contextmanager
def restoring_torch_settings() -> Iterator[None]:
    """Restore the settings of torch that affect numbers when the context ends."""
    dtype, device, threads = torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()
    gradients, precision = torch.is_grad_enabled(), torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_grad_enabled(gradients)
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
