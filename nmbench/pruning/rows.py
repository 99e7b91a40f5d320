"""One row from beginning to end: prune, prove, measure, keep the files; or the record of a failure."""

from __future__ import annotations

import traceback
from pathlib import Path

from nmbench.errors import CannotWrite, ModelChanged, NMBenchError, RankLost, interrupts
from nmbench.evaluation.subject import DenseSubject, Subject
from nmbench.experiment.dense_checks import dense_doubts
from nmbench.experiment.jobs import Job, dense_digest
from nmbench.experiment.measurement import measured
from nmbench.experiment.record import dense_record, failed, record_of
from nmbench.experiment.reuse import Shared
from nmbench.experiment.setup import Experiment
from nmbench.methods import PrunedModel
from nmbench.plugins.loading import Plugins
from nmbench.pruning.starts import WEIGHTS
from nmbench.pruning.together import made_together
from nmbench.results.directory import RunDirectory
from nmbench.results.files import read_tensors, save_masks, write_atomic, write_tensors
from nmbench.results.format import Record
from nmbench.results.kept_weights import save_weights
from nmbench.runtime.cost import Meter
from nmbench.runtime.isolation import isolating
from nmbench.spec import DENSE


def dense_row(experiment: Experiment, directory: RunDirectory) -> tuple[Record, DenseSubject]:
    """Return the record and the losses of the dense model, read from the run directory or measured.

    Raises `NMBenchError` if the dense model cannot be measured, because every other row is compared with it.
    """
    digest = dense_digest(experiment.protocol_digest)
    path = directory.file("losses", DENSE, ".safetensors")
    record = directory.finished(digest, DENSE)
    if record is not None:
        return record, DenseSubject(read_tensors(path)[0])
    try:
        with isolating():
            found = measured(experiment, DENSE)
            doubts = dense_doubts(found.subject)
    except (CannotWrite, ModelChanged):
        raise
    except BaseException as error:
        if interrupts(error):
            raise
        message, trace = explained(error, DENSE, directory)
        raise NMBenchError(f"the dense model cannot be measured: {message} (traceback: {trace})") from error
    keep_losses(path, found.subject, about(DENSE, digest, experiment))
    record = dense_record(experiment, found, doubts)
    if not experiment.is_intact(restore=False):
        experiment.renew(DENSE)
    directory.append(record)
    experiment.plugins.announce("nmbench_method_finished", record=record)
    return record, DenseSubject(found.subject.cached)


def new_row(job: Job, experiment: Experiment, dense: DenseSubject, directory: RunDirectory, shared: Shared) -> Record:
    """Return the record of a job that is not finished: copied from a row of the same work, or made now.

    The dense model is then what it was.
    """
    record = shared.row(job, experiment, directory)
    if record is None:
        record = attempted(job, experiment, dense, directory)
        if not experiment.is_intact(restore=record["status"] != "ok"):  # a job that ended well has restored the weights
            directory.leave(record, job.name)  # a model that cannot be loaded again must not cost the record
            experiment.renew(job.title)
        shared.keep(job, record)
    return record


def keep_row(record: Record, job_name: str, directory: RunDirectory, plugins: Plugins) -> None:
    """Make a record durable, then hand it to the observers."""
    directory.append(record)
    directory.drop_left(job_name)
    directory.drop_checkpoint(job_name, record)
    plugins.announce("nmbench_method_finished", record=record)


def attempted(job: Job, experiment: Experiment, dense: DenseSubject, directory: RunDirectory) -> Record:
    """Return the record of one job; a method that raises, or calls exit, gives a failed record and a traceback file."""
    try:
        with isolating():
            return done(job, experiment, dense, directory)
    except (CannotWrite, ModelChanged, RankLost):
        raise
    except BaseException as error:
        if interrupts(error):
            raise
        message, trace = explained(error, job.name, directory)
        return failed(job, experiment, message, str(trace.relative_to(directory.path)))


def done(job: Job, experiment: Experiment, dense: DenseSubject, directory: RunDirectory) -> Record:
    """Return the record of one job that was pruned, proven and measured, its files written. Exceptions pass through."""
    with Meter(experiment.bundle.device) as meter:
        work = made_together(job, experiment, directory)
    meter.spent += work.earlier
    found = measured(experiment, job.title, work.pruned, experiment.patterns(job.pattern), dense)
    kept_bytes = keep_files(job, experiment, directory, work.pruned, found.subject)
    return record_of(job, experiment, work.pruned, work.cost, meter, found, dense, kept_bytes)


def explained(error: BaseException, name: str, directory: RunDirectory) -> tuple[str, Path]:
    """Return one line about the error that is being handled, and the file that its traceback was written to."""
    trace = directory.file("errors", name, ".txt")
    write_atomic(trace, traceback.format_exc().encode())
    kind = "" if isinstance(error, NMBenchError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split()), trace


def keep_files(
    job: Job, experiment: Experiment, directory: RunDirectory, pruned: PrunedModel, subject: Subject
) -> int | None:
    """Write the files that belong to the record: packed masks, losses by window and, if they are kept, the weights.

    Returns the bytes of the file of weights; None without one.
    """
    origin = about(job.label, job.digest, experiment)
    keep_losses(directory.file("losses", job.name, ".safetensors"), subject, origin)
    masks = directory.file("masks", job.name, ".safetensors")
    save_masks(masks, pruned.masks, experiment.patterns(job.pattern), origin)
    return keep_weights(directory.file(WEIGHTS, job.name, ".safetensors"), job, experiment, pruned, origin)


def keep_weights(
    path: Path, job: Job, experiment: Experiment, pruned: PrunedModel, origin: dict[str, str]
) -> int | None:
    """Write the weights of a repair, or of a row that a repair begins with, as measured; return the bytes.

    Other rows with changed weights are made again when they are wanted, and so are all with `--no-keep-weights`.
    """
    wanted = job.repairs is not None or job.label in experiment.plan.repaired
    if not wanted or not pruned.weights_changed or experiment.spec.keep_weights is False:
        path.unlink(missing_ok=True)
        return None
    live = experiment.bundle.layers
    changed = {name: layer.weight for name, layer in pruned.layers.items() if layer.weight is not None}
    weights = {name: weight.to(live[name].read().dtype) + 0.0 for name, weight in changed.items()}
    return save_weights(path, weights, pruned.masks, pruned.others, origin)


def keep_losses(path: Path, subject: Subject, origin: dict[str, str]) -> None:
    """Write the losses of every window, and the other figures by window that metrics kept."""
    write_tensors(path, {**subject.cached, **subject.per_window}, origin)


def about(label: str, digest: str, experiment: Experiment) -> dict[str, str]:
    """Return the origin of a file as its metadata: label, job digest, model, digest of the dense weights."""
    return {
        "label": label,
        "job_digest": digest,
        "model": experiment.bundle.ref,
        "model_digest": experiment.dense.digest,
    }
