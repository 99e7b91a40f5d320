"""Laws of the progress lines, and of their estimate of the time left. `test_live.py` has those of a terminal."""

import io
import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmbench.experiment import progress
from nmbench.experiment.progress import LINE_SECONDS, PATIENCE_SECONDS, Pace, ProgressPrinter, duration, line_of
from nmbench.plugins.events import Progress

quick = settings(max_examples=60, deadline=None)
JOB = "acme 2:4 seed 0"
DENSE = {"label": "dense", "pattern": None, "seed": None, "status": "ok"}
DENSE |= {"metrics": {"ppl:demo@8": {"value": 7.0}}, "seconds": {"total": 3.21}}
DONE = {**DENSE, "label": "acme", "pattern": "2:4", "seed": 0}
FAILED = {**DONE, "status": "failed", "error": "no such luck", "metrics": {}}


def watch(stream, events, clock=1000.0):
    """Show pairs of (seconds since the one before, event or record) and return the stream's text."""
    now = SimpleNamespace(seconds=clock)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.seconds))
        printer = ProgressPrinter(stream)
        for pause, event in events:
            now.seconds += pause
            if isinstance(event, Progress):
                printer.nmbench_progress(event)
            else:
                printer.nmbench_method_finished(event)
    return stream.getvalue()


# A line


@quick
@given(st.integers(0, 500), st.integers(0, 500))
def test_line_says_job_stage_and_count(done, total):
    """A line has job, stage and count, of a total where there is one, and figures; no time unless it is known."""
    event = Progress(JOB, "learn", done, total, {"loss": 3.41421, "flips": 12.0})
    count = f"{done}/{total}" if total else f"{done}"
    assert line_of(event, None) == f"{JOB}: learn {count}, loss 3.414, flips 12"
    assert line_of(event, 65.0) == f"{JOB}: learn {count}, loss 3.414, flips 12, 1 min 05 s left"


def parsed(text):
    """Hours, minutes and seconds of a duration."""
    return [int(found[1]) if (found := re.search(rf"(\d+) {unit}\b", text)) else None for unit in ("h", "min", "s")]


@quick
@given(st.floats(0, 1e6) | st.sampled_from([59.4, 59.5, 59.9, 60, 119.7, 3599.4, 3599.5, 3600, 7199.9]))
def test_duration_is_right_to_its_last_unit(seconds):
    """A duration is right to half a second, or from an hour on to a minute, and never says 60 of a unit."""
    hours, minutes, rest = parsed(duration(seconds))
    shown = 3600 * (hours or 0) + 60 * (minutes or 0) + (rest or 0)
    assert abs(shown - seconds) <= (60 if hours else 0.5)
    assert (minutes or 0) < 60
    assert (rest or 0) < 60
    assert (hours is None) == (seconds < 3599.5)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (5.4, "5 s"), (65, "1 min 05 s"), (3599, "59 min 59 s"), (3900, "1 h 05 min")]
)
def test_durations_as_people_say_them(seconds, text):
    """Two units at most, the smaller one with two digits."""
    assert duration(seconds) == text


# A file


def test_file_gets_a_line_now_and_then():
    """In a file, a stage shows itself when it has lasted a while, and then at long intervals, a line each."""
    events = [(0.5, Progress(JOB, "learn", done, 200)) for done in range(200)]  # 99.5 seconds
    text = watch(io.StringIO(), events)
    lines = text.splitlines()
    assert text.endswith("\n")
    assert "\r" not in text
    assert lines[0].startswith(f"{JOB}: learn {int(PATIENCE_SECONDS / 0.5)}/200")
    assert len(lines) == 1 + int((99.5 - PATIENCE_SECONDS) / LINE_SECONDS)


def test_short_stages_do_not_show_in_a_file():
    """A stage shorter than the patience of a file leaves no line there, but its finished row does."""
    events = [(1, Progress(JOB, stage, done, 3)) for stage in ("calibrate", "prune", "evaluate") for done in range(3)]
    assert watch(io.StringIO(), [*events, (0, DONE)]).splitlines() == ["acme 2:4 seed 0: ppl:demo@8 7.0000 in 3.2 s"]


def test_failed_rows_say_why():
    """A failed job is shown at once with its error."""
    assert watch(io.StringIO(), [(0, FAILED)]) == "acme 2:4 seed 0: failed: no such luck\n"


# The time that is left


def left(events):
    """The seconds that are left after pairs of (pause, event)."""
    pace, now = Pace(), 1000.0
    for pause, event in events:
        now += pause
        pace.begins(event, now)
    return pace.seconds_left(event, now)


@quick
@given(st.integers(0, 400), st.integers(1, 50), st.integers(1, 60))
def test_time_left_is_by_the_pace_since_the_stage_began(start, step, pause):
    """At a steady pace the time left is what the rest will take, also where a resumed stage begins in the middle."""
    events = [(pause, Progress(JOB, "learn", start + n * step, start + 10 * step)) for n in range(3)]
    assert left(events) == pytest.approx(8 * pause)


def test_pace_is_that_of_the_stage():
    """A new stage, or another job, starts counting anew: its first line knows no time."""
    events = [(1, Progress(JOB, "prune", done, 9)) for done in range(9)]
    for other in (Progress(JOB, "evaluate", 5, 9), Progress("next", "prune", 5, 9)):
        assert left([*events, (1, other)]) is None


def test_no_time_without_a_total():
    """Where the end is not known, no time is promised."""
    assert left([(1, Progress(JOB, "learn", done, 0)) for done in range(5)]) is None
