"""Laws of the overall progress: which job of how many is at work, and the time that is left for all of them."""

import pytest

from nmbench.experiment.forecast import Forecast
from nmbench.experiment.timetable import Left, Timetable


def row(title, done=False, seconds=None):
    return Forecast(title.split()[0], title, done, seconds, None, None)


def finished(title, seconds, copied_from=None):
    label, pattern, _, seed = title.split()
    about = {"label": label, "pattern": pattern, "seed": int(seed), "status": "ok", "copied_from": copied_from}
    return {**about, "seconds": {"total": seconds}}


@pytest.fixture
def table():
    """Dense is done; two seeds of a quick method are known, three of a slow one are not."""
    rows = [row("dense", True, 1.0), *(row(f"quick 2:4 seed {seed}", seconds=10.0) for seed in (0, 1))]
    table = Timetable()
    table.begin([*rows, *(row(f"slow 2:4 seed {seed}") for seed in (0, 1, 2))])
    return table


def test_the_job_at_work_is_counted(table):
    """Rows that were done before count, and so does the one at work; work on no row of the run is not counted."""
    assert table.place("quick 2:4 seed 0") == "job 2 of 6"
    table.finish(finished("quick 2:4 seed 0", 12.0))
    assert table.place("quick 2:4 seed 1") == "job 3 of 6"
    assert table.place("self:demo seed 0") == "job 2 of 6"
    assert Timetable().place("dense") == ""


def test_time_left_is_the_sum_of_what_is_known(table):
    """The rest of the job at work and the forecasts of the others; rows without a forecast are counted apart."""
    assert table.left("quick 2:4 seed 0", 4.0, None) == Left(6.0 + 10.0, 3)
    assert table.left("quick 2:4 seed 0", 4.0, 30.0) == Left(30.0 + 10.0, 3)  # its stage alone takes longer
    assert table.left("quick 2:4 seed 0", 99.0, None) == Left(10.0, 3)


def test_rows_of_a_label_tell_of_each_other(table):
    """A row that is finished gives the seconds of the others of its label, unless its figures were copied."""
    table.finish(finished("slow 2:4 seed 0", 0.1, copied_from="x"))
    assert table.left("quick 2:4 seed 0", 0.0, None).unknown == 2
    table.finish(finished("slow 2:4 seed 1", 50.0))
    assert table.left("quick 2:4 seed 0", 0.0, None) == Left(10.0 + 10.0 + 50.0, 0)


def test_a_row_at_work_without_a_forecast_has_the_time_of_its_stage(table):
    """Its stage is all that is known of it; without that its time is unknown too."""
    assert table.left("slow 2:4 seed 0", 5.0, 7.0) == Left(20.0 + 7.0, 2)
    assert table.left("slow 2:4 seed 0", 5.0, None) == Left(20.0, 3)


def test_words():
    """The time left, and whether more rows are to come."""
    assert str(Left(65.0, 0)) == "about 1 min 05 s left"
    assert str(Left(65.0, 2)) == "more than 1 min 05 s left (2 rows of unknown time)"
    assert str(Left(0.0, 1)) == "1 row of unknown time left"
