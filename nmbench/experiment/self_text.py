"""Calibration pools of text that is sampled from the dense model, with real text mixed in where that is asked for.

Selection windows stay real text. The samples of a seed are drawn in pieces, which the run directory keeps.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from nmbench.data import Pool, tokens_digest
from nmbench.errors import NMBenchError
from nmbench.experiment.doubts import Doubt
from nmbench.experiment.pools import pool_windows, real_places
from nmbench.experiment.sampled_pieces import Piece, Sampler
from nmbench.experiment.sampled_windows import Sieve, looping
from nmbench.experiment.setup import Experiment
from nmbench.results.directory import RunDirectory
from nmbench.results.format import SampledText
from nmbench.runtime.isolation import isolating

MOST_DRAWN = 4  # times the windows that are needed: beyond that the samples are the same again and again
MANY_LOOPS = 0.02  # share of windows that repeat themselves, beyond that of real text


def sample_text(experiment: Experiment, directory: RunDirectory) -> None:
    """Give `experiment` its pools if its calibration text is sampled from the dense model; else change nothing.

    Raises `RunMismatch` if the directory holds another run, before anything is sampled, and `NMBenchError` if the model
    gives no text or only the same text again and again.
    """
    if experiment.sampling is None:
        return
    directory.joined_spec(experiment.spec)
    with isolating():
        found = {seed: sampled_pool(experiment, directory, seed) for seed in experiment.spec.seeds}
    experiment.pools = {seed: pool for seed, (pool, _) in found.items()}
    experiment.sampled = {seed: about for seed, (_, about) in found.items()}
    experiment.doubts += tuple(sampling_doubts(experiment.sampled))


def sampled_pool(experiment: Experiment, directory: RunDirectory, seed: int) -> tuple[Pool, SampledText]:
    """Return the pool of one seed, sampled windows and real ones in their places, and its description."""
    real, sampling = experiment.real[seed], experiment.sampling
    assert sampling is not None
    places = torch.tensor(real_places(pool_windows(experiment.spec, experiment.plan.learns), sampling.options.real))
    shown = real.calibration[: int(places.sum())]
    files = functools.partial(directory.file, "sampled", suffix=".safetensors")
    sampler = Sampler(experiment.bundle, experiment.dense.digest, sampling, real, seed, files)
    sieve = Sieve(real.calibration.shape[1], real.bos, others(experiment, real, shown))
    pieces = gathered(experiment, sampler, sieve, int((~places).sum()))
    samples = sieve.kept[: int((~places).sum())]
    calibration = torch.empty(len(places), samples.shape[1], dtype=torch.int64)
    calibration[places], calibration[~places] = shown, samples
    notes = f"{real.notes}; {len(samples)} of {len(places)} calibration windows sampled from the dense model"
    pool = dataclasses.replace(real, calibration=calibration, notes=notes)
    return pool, described(sampler, sieve, pieces, samples, len(shown))


def others(experiment: Experiment, real: Pool, shown: Tensor) -> dict[str, Tensor]:
    """Return the texts that no sample may repeat, by name: test texts, selection windows, real windows of the pool."""
    tests = {f"the test text {name}": tokens for name, tokens in experiment.texts.items()}
    return {**tests, "selection windows": real.selection[:, real.bos :], "real windows": shown[:, real.bos :]}


def gathered(experiment: Experiment, sampler: Sampler, sieve: Sieve, wanted: int) -> list[Piece]:
    """Sample pieces until `sieve` has kept `wanted` windows, and return the pieces. Progress counts drawn tokens.

    Raises `NMBenchError` if too many windows repeat others.
    """
    batch, length = sampler.sampling.options.batch, sampler.real.calibration.shape[1]
    report = experiment.reporter(f"{experiment.spec.calibration} seed {sampler.seed}", "sample")
    each = batch * (length - sampler.prompt_tokens)  # tokens drawn for a piece
    total = math.ceil(wanted / batch) * each
    pieces: list[Piece] = []
    while len(sieve.kept) < wanted:
        done = len(pieces) * each
        if len(pieces) * batch >= MOST_DRAWN * max(wanted, batch):
            raise NMBenchError(
                f"--calibration {experiment.spec.calibration} gives only {len(sieve.kept)} of {wanted} windows after "
                f"{len(pieces) * batch} samples, because the others repeat {listed(sieve.left_out)}; raise "
                f"temperature, name a longer text for prompts, or lower --pool-tokens and --windows."
            )
        pieces.append(sampler.piece(len(pieces), progress(report, done, batch, max(total, done + each))))
        sieve.add(pieces[-1].windows)
    return pieces


def progress(report: Callable[[int, int], None], done: int, batch: int, total: int) -> Callable[[int], None]:
    """Return a callback for one piece: the tokens that each of its windows got -> all tokens that were drawn."""
    return lambda drawn: report(done + batch * drawn, total)


def described(sampler: Sampler, sieve: Sieve, pieces: list[Piece], samples: Tensor, shown: int) -> SampledText:
    """Return what the record says of the samples of one seed. The cost is that of every piece, interruptions or not."""
    skip, options = sampler.real.bos, sampler.sampling.options
    return {
        "source": sampler.sampling.source,
        "prompt": options.prompt,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "real": options.real,
        "batch": options.batch,
        "windows": len(samples),
        "real_windows": shown,
        "drawn_tokens": samples[:, sampler.prompt_tokens :].numel(),
        "forward_tokens": sum(piece.forward_tokens for piece in pieces),
        "seconds": round(sum(piece.seconds for piece in pieces), 3),
        "left_out": {name: count for name, count in sieve.left_out.items() if count},
        "looping": round(looping(samples[:, skip:]), 4),
        "looping_real": round(looping(sampler.real.calibration[:, skip:]), 4),
        "ending": round(sum(piece.ending for piece in pieces) / max(1, len(pieces)), 6),
        "digest": tokens_digest(samples),
    }


def sampling_doubts(sampled: Mapping[int, SampledText]) -> Iterator[Doubt]:
    """Yield a doubt on every seed whose samples repeat themselves more often than real text does."""
    for seed, about in sampled.items():
        if about["looping"] > about["looping_real"] + MANY_LOOPS:
            yield Doubt(
                "calibration",
                f"{about['looping']:.1%} of the {about['windows']} sampled windows of seed {seed} repeat themselves; "
                f"{about['looping_real']:.1%} of the real windows do. A higher temperature may help.",
            )


def listed(left_out: Mapping[str, int]) -> str:
    """Return the texts that windows repeat, with their numbers: `earlier samples (12), selection windows (1)`."""
    return ", ".join(f"{name} ({count})" for name, count in left_out.items() if count)
