"""One row made by the ranks of torchrun: all of them walk or learn, rank 0 measures and writes."""

from __future__ import annotations

from nmbench.errors import RankLost, interrupts
from nmbench.experiment.jobs import Job
from nmbench.experiment.setup import Experiment
from nmbench.pruning.dispatch import made
from nmbench.pruning.one_shot import Made
from nmbench.results.directory import RunDirectory
from nmbench.runtime.isolation import isolating
from nmbench.runtime.ranks import Ranks, joined_ranks, sharing_by


def made_together(job: Job, experiment: Experiment, directory: RunDirectory) -> Made:
    """Return masks, weights and cost of a job, which other ranks share if the method can be shared.

    Exceptions of the method pass through. Raises `RankLost` if the ranks are no longer in step.
    """
    ranks = joined_ranks()
    if ranks.size == 1 or not job.contender.method.data_parallel:
        return made(job, experiment, directory)
    ranks.tell(job.name)
    return in_step(ranks, job, experiment, directory)


def in_step(ranks: Ranks, job: Job, experiment: Experiment, directory: RunDirectory) -> Made:
    """Return what a job makes on this rank, once every rank has ended the job."""
    failure: BaseException | None = None
    try:
        with sharing_by(ranks):
            return made(job, experiment, directory)
    except BaseException as error:
        failure = error
        raise
    finally:
        if failure is None or not (isinstance(failure, RankLost) or interrupts(failure)):
            ranks.end(failure)


def take_part(ranks: Ranks, job: Job, experiment: Experiment, directory: RunDirectory) -> None:
    """Make a row with rank 0, which keeps it. An error that all ranks have ends the job, and not this process.

    The dense model is restored as after any job.
    """
    ended_well = False
    try:
        with isolating():
            in_step(ranks, job, experiment, directory)
        ended_well = True
    except RankLost:
        raise
    except BaseException as error:
        if interrupts(error):
            raise
    if not experiment.is_intact(restore=not ended_well):
        experiment.renew(job.title)
