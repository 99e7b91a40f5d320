"""Laws of `run.log`: what it holds, when it begins, and that a run goes on without it."""

import io
import re

from nmbench.experiment.run_log import NAME, LogFile

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[\d+\] (.*)")


def content(path):
    """The lines of a log without their times, each of which must have one."""
    return [LINE.fullmatch(line)[1] for line in (path / NAME).read_text(encoding="utf-8").splitlines()]


def test_lines_wait_for_the_directory(tmp_path):
    """Lines before the directory is known are written when it is; later ones follow, in one file."""
    log = LogFile()
    log.write("early\n")
    log.flush()
    assert not (tmp_path / NAME).exists()
    log.open(tmp_path)
    log.write("late\nand ünicode\n")
    log.flush()
    LogFile(tmp_path).open(tmp_path)
    assert content(tmp_path) == ["early", "late", "and ünicode"]


def test_a_log_that_cannot_be_written_is_said_once(tmp_path):
    """A folder in its place, as a full disk, gives one notice and no exception."""
    (tmp_path / NAME).mkdir()
    notices = io.StringIO()
    log = LogFile(tmp_path, notices)
    for _ in range(3):
        log.write("line\n")
        log.flush()
    why = "cannot be written: Is a directory; the run goes on without it."
    assert notices.getvalue() == f"NOTICE {tmp_path / NAME} {why}\n"


def test_a_run_is_logged(nmbench, small, tmp_path):
    """The log of a run holds its start, its rows, its doubts and its end, also when nothing else is printed."""
    assert nmbench("run", *small, "--method", "wanda", "--quiet").exit_code == 0
    lines = content(tmp_path / "out")
    assert lines[0] == "run started: 4 rows, 0 of them done"
    rows = [line for line in lines if re.search(r" in \d+\.\d s$", line)]
    assert [row.split(":")[0] for row in rows] == ["dense", "maskpro@init 2", "maskpro 2", "wanda 2"]
    assert any(line.startswith("DOUBT dense model") for line in lines)
    assert lines[-1] == "run finished"
