"""The GPUs that a process may use, and whether it has the one that it took.

CUDA reads `CUDA_VISIBLE_DEVICES` once, when a process first uses it or asks for the number of GPUs. A process that is
to have one GPU of several must not do either before the variable is set.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Mapping

import torch

from nmbench.errors import NMBenchError

GPUS = "CUDA_VISIBLE_DEVICES"
NO_GPU = ("", "-1")  # at which CUDA stops to read the variable
COUNT = "import torch; print(torch.cuda.device_count())"
PATIENCE = 120.0  # seconds: torch may be imported from a slow disk


def visible(environment: Mapping[str, str], count: Callable[[], int]) -> list[str]:
    """Return the GPUs that `environment` leaves a process, as CUDA names them; `count` is asked if it names none."""
    named = environment.get(GPUS)
    found = map(str, range(count())) if named is None else map(str.strip, named.split(","))
    return list(itertools.takewhile(lambda gpu: gpu not in NO_GPU, found))


def counted() -> int:
    """Return the number of GPUs, for which another process is started: this one does not use CUDA.

    Raises `NMBenchError` if that process fails or does not answer.
    """
    return answer(COUNT, PATIENCE) if torch.backends.cuda.is_built() else 0


def answer(program: str, seconds: float) -> int:
    """Return the number that a Python program prints last. Raises `NMBenchError` if there is none within `seconds`."""
    command = [sys.executable, "-c", program]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds)
        return int(done.stdout.split()[-1])
    except subprocess.TimeoutExpired:
        why = f"no answer in {seconds:.0f} s"
    except (OSError, ValueError, IndexError) as error:
        why = str(error) if isinstance(error, OSError) else " ".join(done.stderr.splitlines()[-1:]) or "no number"
    raise NMBenchError(
        f"the GPUs of this host cannot be counted: `python -c {program!r}` has failed ({why}); name them in {GPUS}, as "
        f"0,1, or choose --device cpu."
    )


def seen() -> int:
    """Return the number of GPUs that CUDA gives this process, which CUDA is asked for: it is final from then on.

    `torch.cuda.device_count()` may read the variable itself, and would not see that CUDA has read it before.
    """
    ask: Callable[[], int] | None = getattr(torch._C, "_cuda_getDeviceCount", None)
    return 0 if ask is None else ask()


def check_taken(gpu: str, count: int, used: bool) -> None:
    """Raise `NMBenchError` unless this process has the one GPU that it took by `CUDA_VISIBLE_DEVICES`.

    `count`: how many CUDA gives it; `used`: whether it had used CUDA before it took `gpu`.
    """
    if used or count > 1:
        raise NMBenchError(
            f"this process took GPU {gpu} by {GPUS} too late: something had used CUDA before, which gives it {count} "
            f"GPUs and must give it that one alone; join the ranks before transformers, torchao or plugins are "
            f"imported, as `torchrun -m nmbench.cli run` does."
        )
    if count < 1:
        raise NMBenchError(
            f"this process took GPU {gpu} by {GPUS}, and CUDA finds no such GPU; compare it with `nvidia-smi -L`, or "
            f"choose --device cpu."
        )
