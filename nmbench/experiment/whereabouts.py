"""What of a run lies where: on the device, in host memory and on disk, in bytes, by purpose; an estimate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nmbench.calibration.waiting import hidden_bytes
from nmbench.calibration.walk import batch_tokens
from nmbench.experiment.memory import GIBIBYTE, Estimate, bytes_of, changes_weights, planned
from nmbench.methods import Layerwise, Method, Stat
from nmbench.models.bundle import Bundle, hidden_width
from nmbench.models.hashing import MOST_THREADS, PART_BYTES
from nmbench.spec import ResolvedSpec


@dataclass(frozen=True)
class Whereabouts:
    """Bytes by purpose in each place. `source`: where blocks are streamed from, `host` or `disk`; None: not streamed.

    What torch and its libraries take themselves is not included, nor what learners of the whole model hold.
    """

    source: str | None
    device_name: str
    device: Mapping[str, int]
    host: Mapping[str, int]
    disk: Mapping[str, int]

    def lines(self) -> list[str]:
        """Return a line for each place that holds something: `host: about 4.2 GiB (outside blocks 3.9, ...)`."""
        places = {self.device_name: self.device, "host memory": self.host, "disk": self.disk}
        return [
            f"{name}: about {total(parts):.1f} GiB ({', '.join(f'{n} {b / GIBIBYTE:.1f}' for n, b in parts.items())})"
            for name, parts in places.items()
            if parts
        ]


def total(parts: Mapping[str, int]) -> float:
    """Return the sum in GiB."""
    return sum(parts.values()) / GIBIBYTE


def whereabouts(
    bundle: Bundle, spec: ResolvedSpec, methods: Sequence[Method], device: torch.device, source: str | None
) -> Whereabouts:
    """Return where weights, masks and hidden states lie while `methods` prune the model of `bundle`.

    The bundle may lie on the meta device. `source`: as `streamed_from` returns it.
    """
    plan = planned(bundle, spec, methods, device, streamed=source is not None)
    on_device = {name: getattr(plan, name) for name in ("weights", "hidden", "statistics", "working")}
    blocks = [bytes_of(block) for block in bundle.blocks.values()]
    inside, outside = sum(blocks), bytes_of(bundle.model) - sum(blocks)
    masks = sum(math.prod(layer.shape) for layer in bundle.layers.values())
    repaired = masks * bundle.dtype.itemsize * any(changes_weights(method) for method in methods)
    held = {"masks": masks, **({"repaired weights": repaired} if repaired else {})}
    away = math.ceil(left(bundle, spec, methods, plan) * rounding(bundle, spec.window_tokens, device))
    waiting = {"hidden states": away} if away else {}
    if source is None:
        host = {"dense weights": inside + outside}
        return Whereabouts(source, device.type, {**on_device, **held}, host, {})
    ahead = {"blocks read ahead": 2 * max(blocks)}
    if source == "host":
        host = {"live weights": inside, "dense weights": inside + outside, **held, **ahead, **waiting}
        return Whereabouts(source, device.type, on_device, host, {})
    hashed = {"hashing": min(inside, 4 * MOST_THREADS * PART_BYTES)}
    host = {"dense weights outside blocks": outside, **ahead, **hashed, **waiting}
    disk = {"dense weights, in the model's files unless converted": inside, "pruned weights": inside, **held}
    return Whereabouts(source, device.type, on_device, host, disk)


def rounding(bundle: Bundle, window_tokens: int, device: torch.device) -> float:
    """Return how many times the bytes of a batch of hidden states torch takes of pinned memory: a power of two."""
    if device.type != "cuda":
        return 1.0
    windows = max(1, batch_tokens(bundle, device) // window_tokens)
    size = windows * window_tokens * hidden_width(bundle) * bundle.dtype.itemsize
    return float(2 ** (size - 1).bit_length() / size)


def left(bundle: Bundle, spec: ResolvedSpec, methods: Sequence[Method], plan: Estimate) -> int:
    """Return the bytes of the hidden states that wait on the host while a block is pruned or learnt: of the calibration
    windows, or of the pool, whichever is more.
    """
    beside = any(isinstance(method, Layerwise) and method.needs & (Stat.DRIFT | Stat.LAG) for method in methods)
    walked = 0 if plan.hidden else hidden_bytes(bundle, spec.windows * spec.window_tokens, 1 + beside)
    learnt = any(it.blockwise and not it.hidden for it in plan.learning)
    return max(walked, hidden_bytes(bundle, spec.pool_tokens, paths=2) if learnt else 0)
