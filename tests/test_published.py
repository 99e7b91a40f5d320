"""Published tables: those of nmbench are whole and can be run; what is no table is refused in one line."""

import dataclasses
import importlib.util

import pytest

from nmbench.cli.published import masks
from nmbench.cli.published.catalogue import FOLDER, table_named, tables
from nmbench.cli.published.specification import only, spec_of
from nmbench.cli.published.table import MaskFile, read_table
from nmbench.cli.published.verdicts import FAILED, OUTSIDE, WITHIN, Verdict, verdict_text, verdicts
from nmbench.errors import NMBenchError
from nmbench.experiment.plan import checked
from nmbench.plugins.loading import load_plugins
from pages import blocks

NAMES = sorted(path.stem for path in FOLDER.glob("*.toml"))
HEAD = 'title = "A"\nmodel = "demo"\npattern = "2:4"\nsource = "a paper, table 1"\n'
DENSE = '[[line]]\nlabel = "dense"\nmetric = "ppl:demo@256"\nvalue = 36.6\ntolerance = 0.01\nbecause = "rounding"\n'
WANDA = DENSE.replace("dense", "wanda").replace("36.6", "147")


@pytest.fixture
def written(tmp_path):
    def write(text):
        (tmp_path / "own.toml").write_text(text)
        return tmp_path / "own.toml"

    return write


@pytest.mark.parametrize("name", NAMES)
def test_every_table_is_a_run(name, tmp_path):
    """Names, options, metrics and patterns of every table are those of methods and metrics that exist."""
    table = table_named(name)
    if any(line.metric.startswith("wordppl") for line in table.lines) and not importlib.util.find_spec("lm_eval"):
        pytest.skip("lm-evaluation-harness is not installed")
    given = tmp_path / "mask.npz" if any(line.masks for line in table.lines) else None
    if given:
        given.touch()
    plan = checked(spec_of(table, {}, given), load_plugins())
    assert {contender.label for contender in plan.contenders} >= {line.label for line in table.lines if line.method}


@pytest.mark.parametrize("name", NAMES)
def test_every_line_has_a_source_and_a_reason(name):
    """Every figure names its source and why its tolerance is what it is; no tolerance is above a sixth."""
    for line in table_named(name).lines:
        assert line.source and line.because
        assert line.tolerance <= 0.15
        assert line.differs or line.method in (None, "magnitude")


def test_the_tables_are_part_of_the_package():
    """The list has every file, sorted, and every file is named as its table."""
    assert [table.name for table in tables()] == NAMES
    assert len(NAMES) >= 4


def test_what_a_line_leaves_out(written):
    """A line has the source of its table, and the method of its label; the dense model has none."""
    table = read_table(written(HEAD + DENSE + WANDA + 'source = "another"\n'))
    assert [(line.method, line.source) for line in table.lines] == [(None, "a paper, table 1"), ("wanda", "another")]
    assert spec_of(table, {"device": "cpu"}).device == "cpu"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD, "own.toml has no line; a table needs title, model"),
        (HEAD + DENSE, "has no pruned row"),
        (HEAD + WANDA + WANDA, "gives ppl:demo@256 of 'wanda' twice"),
        (HEAD + WANDA + WANDA.replace("256", "128") + 'method = "magnitude"\n', "'wanda' to two methods"),
        (HEAD + WANDA.replace("147", "nan"), "value in line 1 of .* must be a positive number, not nan"),
        (HEAD + WANDA.replace("0.01", "0"), "tolerance in line 1 of .* must be a positive number"),
        (HEAD + WANDA.replace("147", '"147"'), "value in line 1 of .*own.toml must be float or int"),
        (HEAD + WANDA.replace('because = "rounding"', ""), "line 1 of .* has no because; a line needs"),
        (HEAD + WANDA + "tolerence = 1\n", "unknown key 'tolerence' in line 1 .* Did you mean 'tolerance'"),
        (HEAD + WANDA + 'masks = { file = "m.npz" }\n', "masks in line 1 of .* has no repository"),
        (HEAD + DENSE + 'method = "wanda"\n' + WANDA, "gives the dense model a method"),
        (HEAD + '[run]\nmodel = "demo"\n' + WANDA, "unknown key 'model' in run of"),
        (HEAD.replace("model", "modell") + WANDA, "unknown key 'modell'"),
        ("title =", "is not TOML"),
    ],
)
def test_what_is_no_table(written, text, message):
    """An entry that is missing, misspelt, of a wrong type or contradictory is refused with its place."""
    with pytest.raises(NMBenchError, match=message) as caught:
        spec_of(read_table(written(text)), {})
    assert "\n" not in str(caught.value)


def test_a_setting_of_the_run_that_is_none(written):
    """The settings of a table's run are those of `nmbench run`."""
    with pytest.raises(NMBenchError, match=r"unknown key 'window' in table own\. Did you mean 'windows'"):
        spec_of(read_table(written(HEAD + "[run]\nwindow = 4\n" + WANDA)), {})


def test_some_lines_only(written):
    """Lines are chosen by label, the dense one always with them; unknown labels and an empty choice are refused."""
    table = read_table(written(HEAD + DENSE + WANDA + DENSE.replace("dense", "magnitude")))
    assert [line.label for line in only(table, ["magnitude"]).lines] == ["dense", "magnitude"]
    assert only(table, []).lines == table.lines
    with pytest.raises(NMBenchError, match=r"unknown label 'wand' in --only, of table own\. Did you mean 'wanda'"):
        only(table, ["wand"])
    with pytest.raises(NMBenchError, match="--only dense leaves no pruned row"):
        only(table, ["dense"])


def test_masks_come_from_the_hub_or_from_a_file(written, tmp_path, monkeypatch):
    """Published masks are an import: of a given file, else of the hub's copy; without either the remedy is named."""
    row = 'masks = { repository = "acme/masks", file = "mask.npz" }\n'
    table = read_table(written(HEAD + DENSE + WANDA.replace("wanda", "theirs") + row))
    assert table.lines[1].masks == MaskFile("acme/masks", "mask.npz")
    (tmp_path / "mine.npz").touch()
    given = spec_of(table, {}, tmp_path / "mine.npz").methods[0]
    assert (given.label, given.name, given.options) == ("theirs", "import", {"path": str(tmp_path / "mine.npz")})
    with pytest.raises(NMBenchError, match=r"nothing does not exist; give mask.npz of hf:acme/masks"):
        spec_of(table, {}, tmp_path / "nothing")
    with pytest.raises(NMBenchError, match="no line with published masks; leave out --masks"):
        spec_of(read_table(written(HEAD + WANDA)), {}, tmp_path / "mine.npz")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, file: f"cache/{repository}/{file}")
    assert spec_of(table, {}).methods[0].options == {"path": "cache/acme/masks/mask.npz"}

    def fails(repository, file):
        raise OSError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fails)
    with pytest.raises(NMBenchError, match=r"cannot be had \(OSError: no\); give --masks FILE") as caught:
        masks.mask_path(MaskFile("acme/masks", "mask.npz"))
    assert "\n" not in str(caught.value)


def record(label, value, pattern="2:4", status="ok"):
    return {"label": label, "pattern": pattern, "status": status, "metrics": {"ppl:demo@256": {"value": value}}}


def test_the_verdict_is_by_share(written):
    """A figure is within if it differs by at most the tolerance times the published one; a failed row is not."""
    table = read_table(written(HEAD + DENSE + WANDA))
    records = [record("dense", 36.6 * 1.0099, None), record("wanda", 147 * 0.989), record("wanda", 147, "4:8")]
    assert [v.word for v in verdicts(table, records)] == [WITHIN, OUTSIDE]
    assert [v.word for v in verdicts(table, [records[0], record("wanda", 147, status="failed")])] == [WITHIN, FAILED]
    line = table.lines[0]
    assert not Verdict(line, float("nan")).within


def test_another_model_stands_beside_every_figure(written):
    """The text names the model where it is not the published one, and says nothing of it where it is."""
    table = read_table(written(HEAD + DENSE + WANDA + 'differs = "their windows"\n'))
    found = verdicts(table, [record("dense", 36.6, None), record("wanda", 147.0)])
    same, other = verdict_text(table, found, "demo"), verdict_text(table, found, "./mine")
    assert other.count("./mine, not demo") == 2 and "not demo" not in same
    assert "wanda ppl:demo@256: a paper, table 1; tolerance 1.0%: rounding; differs: their windows." in same
    assert same.endswith("REPRODUCED: 2 of 2 lines within tolerance.")


def test_the_table_of_the_guide(written):
    """The table on the page is one, and the output on the page is that of its figures."""
    page = dict(blocks("docs/guide/reproduce.md"))
    table = dataclasses.replace(read_table(written(page["toml"])), name="demo")
    found = verdicts(table, [record("dense", 36.6162, None), record("wanda", 146.9665)])
    assert verdict_text(table, found, "demo") + "\n" == page["text"]
