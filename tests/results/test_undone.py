"""Laws of jobs that are not done: what spec.toml asks for and records do not hold."""

from nmbench.results.undone import asked_methods, undone_lines
from reference.run_directory import record_of, write_run

SPEC = {"patterns": ["2:4"], "seeds": [0, 1], "methods": {"wanda": {"method": "wanda"}, "ria": {"method": "ria"}}}


def test_every_method_pattern_and_seed_is_a_job(tmp_path):
    """Of four jobs one is missing and one failed; starts and the dense row are no jobs."""
    rows = [
        *(record_of("dense", None, None), record_of("wanda"), record_of("wanda", seed=1), record_of("ria@init")),
        record_of("ria", status="failed"),
    ]
    path = write_run(tmp_path / "a", rows, SPEC)
    assert undone_lines([path]) == [
        f"{path}: 2 of 4 jobs not done, 1 of them failed; the command in its spec.toml goes on."
    ]
    whole = [*rows[:3], record_of("ria"), record_of("ria", seed=1)]
    assert undone_lines([write_run(tmp_path / "b", whole, SPEC), write_run(tmp_path / "c", rows)]) == []


def test_a_repair_with_several_starts_is_several_jobs(tmp_path):
    """Each start of a repair is a job, under the label of the start."""
    spec = {"patterns": ["2:4"], "seeds": [0], "methods": {"fix": {"method": "distil", "options": {"init": "a, b"}}}}
    path = write_run(tmp_path / "a", [record_of("fix@a", repairs="fix")], spec)
    assert "1 of 2 jobs not done;" in undone_lines([path])[0]
    assert asked_methods(path) == spec["methods"]
