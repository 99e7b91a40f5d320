"""MaskPro: Linear-Space Probabilistic Learning for Strict (N:M)-Sparsity on Large Language Models (arXiv 2506.12876).

One logit per weight; every group of M draws N without replacement with p = softmax(logits). With f the mean token
cross-entropy of the masked dense model, m_0 the initial mask and m_t the mask drawn at step t, each step does

    r      = f(m_t) - f(m_0)            on the same minibatch: forward passes only
    delta <- 0.99 delta + 0.01 r        the moving average of loss residuals
    logits <- logits - lr * (r - delta) * grad log P(m_t)

from logits C * m_0, and the final mask keeps the N largest logits of every group. Patterns with units of several
weights have one logit a unit.

Preset `paper` is the published setting. The default differs from the preset in three named options. `normalise` divides
r - delta by its running spread, so that one learning rate suits models of any size. `shuffle` draws minibatches at
random from the whole pool. `select` measures masks on held-out windows (see `watch`): the learner halves the step size
when learning drifts, goes back to the best mask if much is lost, and returns the best mask, or the initial mask if
other windows do not confirm that the best mask is not worse.

Preset `long` is for larger models and minutes of a GPU: a smaller prior, so that more groups flip in each step, with
much smaller steps and a tracker that forgets fast, so that no single loss has a large weight (benchmarks/README.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import nmbench
from nmbench_plugins.maskpro.limits import MAX_GROUP

if TYPE_CHECKING:
    from torch import Tensor

ENGINES = ("auto", "streamed", "torch")
LOGIT_BYTES = {"float32": 4, "float16": 2}
PAPER = {
    "steps": 10_000,
    "learning_rate": 50.0,
    "prior": 10.0,
    "minibatch": 32,
    "window_tokens": 128,
    "pool_windows": 512,
    "shuffle": False,
    "normalise": False,
    "select": False,
}
LONG = {
    "steps": 20_000,
    "learning_rate": 0.08,
    "prior": 6.0,
    "minibatch": 16,
    "tracker": 0.9,
    "check_every": 500,
}


@dataclass(frozen=True)
class MaskPro(nmbench.MaskLearner):
    """Learn one categorical distribution per group by policy gradient, from forward losses only; weights stay dense."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": PAPER, "long": LONG}
    data_parallel = True
    eight_bit = True

    steps: int = nmbench.option(1000, "updates of the logits", unit="steps")
    learning_rate: float = nmbench.option(1.0, "step size on the logits")
    prior: float = nmbench.option(10.0, "logits start at this value times the initial mask")
    minibatch: int = nmbench.option(8, "windows per step", unit="windows")
    window_tokens: int | None = nmbench.option(None, "window length; none: the pool's, at most 128", unit="tokens")
    pool_windows: int | None = nmbench.option(
        None, "learn from this many windows; none: the whole pool", unit="windows"
    )
    shuffle: bool = nmbench.option(True, "draw minibatches at random instead of in fixed order")
    tracker: float = nmbench.option(0.99, "decay of the moving average of loss residuals")
    normalise: bool = nmbench.option(True, "divide the advantage by its running spread")
    select: bool = nmbench.option(True, "return the best greedy mask on held-out windows if others confirm it")
    tolerance: float = nmbench.option(0.005, "rise over the initial loss that still counts as not worse", unit="nats")
    check_every: int = nmbench.option(100, "steps between two measurements on the held-out windows", unit="steps")
    checkpoint_every: int = nmbench.option(
        100, "steps between two checkpoints; sooner after 3 minutes, later where one takes long", unit="steps"
    )
    engine: str = nmbench.option("auto", "engine that computes the steps; auto: the fastest possible", choices=ENGINES)
    logits: str = nmbench.option(
        "float32", "dtype of the stored logits; float16 needs CUDA", choices=tuple(LOGIT_BYTES)
    )

    def __post_init__(self) -> None:
        least = {"steps": 0, "minibatch": 1, "window_tokens": 2, "pool_windows": 1, "check_every": 1}
        nmbench.check_least(self, "maskpro", {**least, "checkpoint_every": 1})
        if not self.prior > 0:
            raise impossible(f"prior must be above 0, not {self.prior}")
        if not self.tolerance >= 0:
            raise impossible(f"tolerance must be at least 0 nats, not {self.tolerance}")
        if not 0 <= self.tracker < 1:
            raise impossible(f"tracker must lie in [0, 1), not {self.tracker}")

    def supports(self, pattern: nmbench.Pattern) -> str | None:
        fits = pattern.units.group <= MAX_GROUP
        return None if fits else f"its policy draws from groups of at most {MAX_GROUP} weights or units."

    def bytes_per_weight(self, itemsize: int) -> float:
        """Return the bytes of the logits and, with engine `torch`, of a dense copy, a gradient and a mask as well."""
        logits = LOGIT_BYTES[self.logits]
        return logits + itemsize + logits + 1 if self.engine == "torch" else logits

    def learn(self, task: nmbench.LearnTask) -> Mapping[str, Tensor]:
        """Return the learnt mask by layer; the docstring of the module states the algorithm."""
        import torch

        from nmbench_plugins.maskpro.engines import choose
        from nmbench_plugins.maskpro.tracker import Rule
        from nmbench_plugins.maskpro.training import Training

        windows = self.pool(task)
        rule = Rule(self.learning_rate, self.prior, self.tracker, self.normalise)
        with torch.no_grad(), self.explaining_memory(task.who), task.live_weights() as live:
            training = Training(task, self, windows, choose(task, live, rule, self.engine, self.logits))
            training.start()
            training.run()
            return training.conclude()

    def pool(self, task: nmbench.LearnTask) -> Tensor:
        """Return the windows to learn from. Raises `NMBenchError` if the pool has fewer windows, or shorter ones."""
        length = self.window_tokens or min(128, task.pool.shape[1])
        windows = task.windows(length)
        wanted = self.pool_windows or len(windows)
        if wanted > len(windows):
            raise nmbench.NMBenchError(
                f"{task.who} asks for {wanted} windows of {length} tokens, the pool has {len(windows)}; raise "
                f"--pool-tokens to {wanted * length}."
            )
        return windows[:wanted]

    @contextlib.contextmanager
    def explaining_memory(self, who: str) -> Iterator[None]:
        """Turn an out-of-memory error inside the context into an `NMBenchError` with the options to lower."""
        import torch

        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in str(error):
                raise
            raise nmbench.NMBenchError(
                f"{who} ran out of memory with minibatches of {self.minibatch} windows; lower --set {who}.minibatch or "
                f"--set {who}.window_tokens, or choose --dtype bfloat16 or, on CUDA, --set {who}.logits=float16."
            ) from error


def impossible(what: str) -> nmbench.NMBenchError:
    return nmbench.NMBenchError(f"option maskpro.{what}.")
