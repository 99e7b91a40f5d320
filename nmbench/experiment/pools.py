"""The pool of real text of one seed: calibration and selection windows, or those that prompts are taken from."""

from __future__ import annotations

from nmbench.data import Pool, calibration_pool
from nmbench.errors import NMBenchError
from nmbench.experiment.plan import Plan, look_up
from nmbench.models.bundle import Bundle
from nmbench.sources import Dataset, Sampling
from nmbench.spec import ResolvedSpec


def real_text(plan: Plan, name: str) -> tuple[Dataset, Sampling | None]:
    """Return the data set of the calibration `name` and None, or, of sampled text, that of its prompts and how."""
    dataset: Dataset = look_up(plan.plugins, plan.plugins.registries.datasets, name)
    if dataset.sampling is None:
        return dataset, None
    source: Dataset = look_up(plan.plugins, plan.plugins.registries.datasets, dataset.sampling.source)
    return source, dataset.sampling


def pool_of(
    spec: ResolvedSpec, dataset: Dataset, bundle: Bundle, seed: int, learners: bool, least: int | None = None
) -> Pool:
    """Return the pool of one seed; without a mask learner, only the windows for statistics.

    `least`: the calibration windows that suffice, for sampled text; None: all that the specification asks for.
    """
    sizes = (spec.window_tokens, pool_tokens(spec, learners), spec.selection_tokens if learners else 0)
    return calibration_pool(dataset, spec.calibration, bundle.tokenizer, *sizes, seed, spec.bos == "always", least)


def pool_tokens(spec: ResolvedSpec, learners: bool) -> int:
    """Return the tokens of a pool: without a mask learner, only those of the windows for statistics."""
    return spec.pool_tokens if learners else spec.windows * spec.window_tokens


def pool_windows(spec: ResolvedSpec, learners: bool) -> int:
    """Return the number of calibration windows of a pool."""
    return max(1, pool_tokens(spec, learners) // spec.window_tokens)


def least_real(spec: ResolvedSpec, sampling: Sampling, bundle: Bundle, learners: bool) -> int:
    """Return the windows of real text that a sampled pool needs at least: one for prompts, or those that it shows.

    Raises `NMBenchError` if text cannot be sampled: prompts as long as a window, or a model that is not on the device.
    """
    room = spec.window_tokens - (spec.bos == "always")
    if sampling.options.prompt >= room:
        raise NMBenchError(
            f"option self.prompt is {sampling.options.prompt} tokens, and windows have {room} tokens of text; choose "
            f"shorter prompts or a larger --window-tokens."
        )
    if bundle.streaming:
        raise NMBenchError(
            f"--calibration {spec.calibration} samples text from the dense model token by token, which needs the whole "
            f"model on the device, but its blocks come from the host one by one; calibrate on --calibration "
            f"{sampling.source}, or on a larger GPU."
        )
    return max(1, sum(real_places(pool_windows(spec, learners), sampling.options.real)))


def real_places(count: int, share: float) -> list[bool]:
    """Return for each window of a pool whether it is real text; any number of first windows has about that share."""
    return [int((place + 1) * share) > int(place * share) for place in range(count)]
