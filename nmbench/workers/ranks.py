"""The ranks of torchrun in a run: rank 0 does the rows, the others share the walks and learners of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from nmbench.experiment.plan import checked
from nmbench.experiment.self_text import sample_text
from nmbench.experiment.setup import Experiment, prepared
from nmbench.plugins.loading import Plugins
from nmbench.pruning.together import take_part
from nmbench.results.directory import RunDirectory
from nmbench.runtime.ranks import joined_ranks
from nmbench.spec import RunSpec

MODEL = "dense weights"


@contextlib.contextmanager
def helped(experiment: Experiment, directory: RunDirectory) -> Iterator[None]:
    """Let the other ranks take part in the rows that are done while the context is open; nothing with one process.

    Raises `NMBenchError` if they have loaded another model.
    """
    ranks = joined_ranks()
    if ranks.size > 1:
        ranks.tell(str(directory.path.absolute()))
        ranks.check_same(experiment.dense.digest, MODEL)
    yield
    ranks.tell(None)


def help_out(spec: RunSpec, plugins: Plugins) -> None:
    """Make rows with rank 0 until they are done; nothing is written. For a rank that is not 0.

    Raises `NMBenchError` for what ends a run, and `RankLost` if rank 0 is gone.
    """
    from pathlib import Path

    ranks = joined_ranks()
    experiment = prepared(checked(spec, plugins))
    directory = RunDirectory(Path(ranks.told()))  # rank 0 holds its lock
    ranks.check_same(experiment.dense.digest, MODEL)
    sample_text(experiment, directory)  # which rank 0 has sampled
    jobs = {job.name: job for job in experiment.jobs()}
    while (name := ranks.told()) is not None:
        take_part(ranks, jobs[name], experiment, directory)
