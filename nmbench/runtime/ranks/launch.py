"""The place of this process among those that torchrun started, and its GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

import torch

from nmbench.errors import NMBenchError
from nmbench.runtime.gpus import GPUS, check_taken, counted, seen, visible

TORCHRUN = "TORCHELASTIC_RUN_ID"  # a variable of torchrun alone: others set ranks for processes that are not ranks
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Launch:
    """The place of a process: `rank` of `size`, and `local_rank` of `local_size` on its host."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> Launch | None:
        """Return the place that the variables of torchrun give; None for one process."""
        values = [environment.get(name, "") for name in PLACE]
        if TORCHRUN not in environment or not all(map(str.isdecimal, values)) or int(values[1]) < 2:
            return None
        return cls(*map(int, values))

    def has_gpu(self, device: str) -> bool:
        """Take the GPU of this process; return True if there is one. Raises `NMBenchError` as `take_gpu`, and unless
        CUDA then gives this process one GPU.
        """
        used = torch.cuda.is_initialized()
        if not self.take_gpu(device):
            return False
        check_taken(os.environ[GPUS], seen(), used)
        return True

    def take_gpu(
        self, device: str, environment: MutableMapping[str, str] = os.environ, count: Callable[[], int] = counted
    ) -> bool:
        """Leave this process one GPU, its own, by `CUDA_VISIBLE_DEVICES`; return True if there is one.

        `device`: auto, cpu or cuda, as of the run; `count` is asked for the number of GPUs if no variable names them.
        With auto, GPUs that cannot be counted are none. Called before anything uses CUDA, as this does not. Raises
        `NMBenchError` if the host has GPUs, but fewer than ranks, and with cuda if they cannot be counted.
        """
        if device == "cpu":
            return False
        gpus = found(device, environment, count)
        if not gpus and device != "cuda":
            environment[GPUS] = ""  # nor does the run find some later, which ranks would share
            return False
        if len(gpus) < self.local_size:
            raise NMBenchError(
                f"torchrun started {self.local_size} ranks on a host with {len(gpus)} GPUs; give --nproc-per-node "
                f"{max(1, len(gpus))}, or --device cpu."
            )
        environment[GPUS] = gpus[self.local_rank]
        return True


def found(device: str, environment: Mapping[str, str], count: Callable[[], int]) -> list[str]:
    """Return the GPUs that this process may use; none if they cannot be counted, unless `device` is cuda."""
    try:
        return visible(environment, count)
    except NMBenchError:
        if device == "cuda":
            raise
        return []
