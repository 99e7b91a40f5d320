"""The place of this process among those that torchrun started, and its GPU."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from nmbench.errors import NMBenchError

GPUS = "CUDA_VISIBLE_DEVICES"
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

    def take_gpu(self, device: str, environment: MutableMapping[str, str] = os.environ) -> bool:
        """Leave this process one GPU, its own, by `CUDA_VISIBLE_DEVICES`; return True if there is one.

        `device`: auto, cpu or cuda, as of the run. Called before torch has used a GPU. Raises `NMBenchError` if the
        host has GPUs, but fewer than ranks.
        """
        gpus = [] if device == "cpu" else visible(environment)
        if not gpus and device != "cuda":
            return False
        if len(gpus) < self.local_size:
            raise NMBenchError(
                f"torchrun started {self.local_size} ranks on a host with {len(gpus)} GPUs; give --nproc-per-node "
                f"{max(1, len(gpus))}, or --device cpu."
            )
        environment[GPUS] = gpus[self.local_rank]
        return True


def visible(environment: Mapping[str, str]) -> list[str]:
    """Return the GPUs that this process may use, as CUDA names them; CUDA is not initialised."""
    import torch

    named = environment.get(GPUS)
    found = [str(number) for number in range(torch.cuda.device_count())] if named is None else named.split(",")
    return [gpu for gpu in found if gpu]
