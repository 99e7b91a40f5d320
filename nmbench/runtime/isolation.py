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
    folder = os.getcwd()
    with keeping_random_states(), contextlib.redirect_stdout(sys.stderr), restoring_torch_settings():
        try:
            yield
        finally:
            os.chdir(folder)


@contextlib.contextmanager
def keeping_random_states() -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch when the context ends.

    Of GPUs, that of the one at work, if CUDA is started: a state of all would start it on GPUs of somebody else.
    """
    python, numpy = random.getstate(), np.random.get_state()
    used = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=used):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


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
