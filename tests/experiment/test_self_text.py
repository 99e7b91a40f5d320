"""Laws of calibration text that is sampled from the dense model: seeds, pieces, repeats, real text beside it."""

from __future__ import annotations

import shutil

import pytest
import torch

from nmbench.data import SHINGLE, shingles
from nmbench.errors import NMBenchError, RunMismatch
from nmbench.experiment import sampled_pieces
from nmbench.experiment.plan import checked
from nmbench.experiment.pools import real_places
from nmbench.experiment.sampled_pieces import Sampler, special_tokens
from nmbench.experiment.sampled_windows import EARLIER, Sieve, looping, repeated
from nmbench.experiment.self_text import sample_text, sampling_doubts
from nmbench.experiment.setup import prepared
from nmbench.models.sampling import Continuation
from nmbench.plugins.loading import load_plugins
from nmbench.results.directory import RunDirectory
from nmbench.sources import Sampling, SamplingOptions
from nmbench.spec import MethodSpec, RunSpec

PLUGINS = load_plugins()
WINDOW = 64
PROMPT = 48  # tokens: what goes on from them is drawn one by one
BOS = 256


# The reference


@pytest.mark.parametrize(
    ("argument", "source", "options", "text"),
    [
        ("demo", "demo", {}, "demo"),
        ("text:me@home.txt", "text:me@home.txt", {}, "text:me@home.txt"),
        ("demo@temperature=0.50, batch=4", "demo", {"temperature": 0.5, "batch": 4}, "demo@temperature=0.5,batch=4"),
        ("text:a@b@top_p=0.9", "text:a@b", {"top_p": 0.9}, "text:a@b@top_p=0.9"),
        ("c4:main@prompt=16,top_p=none", "c4:main", {}, "c4:main"),
    ],
)
def test_reference(argument, source, options, text):
    """Options stand behind the last @ and have one form, in which defaults are left out."""
    found = Sampling.parse(argument)
    assert found == Sampling(source, SamplingOptions(**options))
    assert str(found) == text
    assert Sampling.parse(str(found)) == found


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("", "self: needs a data set after the colon"),
        ("@real=0.5", "self: needs a data set after the colon"),
        ("demo@temprature=2", "unknown option 'temprature' of self. Did you mean 'temperature'?"),
        ("demo@source=c4", "unknown option 'source' of self."),
        ("demo@batch=few", "option self.batch must be int, not 'few'"),
        ("demo@batch=0", "option self.batch must be at least 1, not 0"),
        ("demo@prompt=0", "option self.prompt must be at least 1, not 0"),
        ("demo@real=1", "option self.real must be at least 0 and less than 1, not 1.0"),
        ("demo@top_p=0", "option self.top_p must be more than 0 and at most 1, or none, not 0.0"),
        ("demo@temperature=-1", "option self.temperature must be at least 0, not -1.0"),
    ],
)
def test_bad_reference(argument, said):
    """A bad reference is one line that names the option."""
    with pytest.raises(NMBenchError) as error:
        Sampling.parse(argument)
    assert said in str(error.value)


def test_real_places():
    """The first windows have the share of real windows that all have, whatever their number."""
    assert real_places(4, 0.0) == [False] * 4
    assert real_places(6, 0.5) == [False, True] * 3
    for share in (0.1, 0.25, 0.7):
        places = real_places(100, share)
        assert places[:30] == real_places(30, share)
        assert all(abs(sum(places[:n]) - n * share) <= 1 for n in range(1, 101))


# Windows that repeat


def tokens(*seeds, length=WINDOW):
    return torch.stack([torch.randint(200, (length,), generator=torch.Generator().manual_seed(s)) for s in seeds])


def test_sieve_leaves_repeats_out():
    """A window that shares a run of 64 tokens with another text, or with an earlier sample, is counted, not kept."""
    length = WINDOW + 20
    test, selection = tokens(0, length=900)[0], tokens(1, 2, length=length)
    windows = tokens(10, 11, 12, 13, 14, length=length)
    windows[1, 3 : 3 + SHINGLE] = test[100 : 100 + SHINGLE]
    windows[2, -SHINGLE:] = selection[1, :SHINGLE]
    windows[3, 1 : 1 + SHINGLE] = windows[0, 9 : 9 + SHINGLE]
    windows[4, : SHINGLE - 1] = test[: SHINGLE - 1]  # one token too short
    sieve = Sieve(length, 0, {"test": test, "selection": selection, "nothing": torch.empty(0, length)})
    sieve.add(windows)
    assert torch.equal(sieve.kept, windows[[0, 4]])
    assert {name: n for name, n in sieve.left_out.items() if n} == {"test": 1, "selection": 1, EARLIER: 1}
    sieve.add(torch.cat([windows[4:], tokens(20, length=length)]))
    assert torch.equal(sieve.kept[2:], tokens(20, length=length))
    assert sieve.left_out[EARLIER] == 2


def test_sieve_skips_bos():
    """BOS is no text: windows that share BOS and 63 tokens are two texts."""
    windows = torch.cat([torch.full((2, 1), BOS), tokens(0, 1)], dim=1)
    windows[1, : WINDOW - 1] = windows[0, : WINDOW - 1]
    sieve = Sieve(WINDOW + 1, 1, {})
    sieve.add(windows)
    assert len(sieve.kept) == 2


def test_repeated_is_brute_force():
    """A run is repeated if a window above has it; runs inside one window are not compared."""
    runs = torch.randint(12, (6, 5), generator=torch.Generator().manual_seed(0))
    expected = [
        [value in above for value in row]
        for row, above in [(r, runs[:i].flatten().tolist()) for i, r in enumerate(runs.tolist())]
    ]
    assert repeated(runs).tolist() == expected


def test_looping():
    """A window loops if fewer than half of its runs of 8 tokens are distinct."""
    straight, loop = torch.arange(WINDOW), torch.arange(10).repeat(7)[:WINDOW]
    half = torch.cat([torch.arange(40), torch.zeros(24, dtype=torch.int64)])
    assert looping(torch.stack([straight, loop, half, loop])) == 0.5
    assert looping(torch.empty(0, WINDOW, dtype=torch.int64)) == 0.0


def test_doubt_on_loops():
    """Loops beyond those of real text are a doubt."""
    about = {"looping": 0.25, "looping_real": 0.05, "windows": 40}
    (doubt,) = sampling_doubts({3: about})
    assert str(doubt).startswith("calibration: 25.0% of the 40 sampled windows of seed 3 repeat themselves; 5.0% of")
    assert not list(sampling_doubts({3: {**about, "looping_real": 0.24}}))


# Through the host


def setup(texts, out, options="", learner=True, **fields):
    """The experiment of a run whose calibration text is sampled in `out`."""
    given = {"windows": 4, "window_tokens": WINDOW, "pool_tokens": 12 * WINDOW, "selection_tokens": 4 * WINDOW}
    spec = RunSpec(
        (MethodSpec.parse("maskpro" if learner else "wanda"),),
        "tiny:llama",
        calibration=f"self:text:{texts}/cal.txt@prompt={PROMPT},batch=5{options}",
        metrics=(f"ppl:text:{texts}/test.txt@64",),
        **{**given, **fields},
    )
    experiment = prepared(checked(spec, PLUGINS))
    with RunDirectory(out) as directory:
        sample_text(experiment, directory)
    return experiment


def real(texts, **fields):
    """The experiment of the same run on the real text."""
    spec = RunSpec(
        (MethodSpec.parse("maskpro"),),
        "tiny:llama",
        calibration=f"text:{texts}/cal.txt",
        metrics=(f"ppl:text:{texts}/test.txt@64",),
        **{"windows": 4, "window_tokens": WINDOW, "pool_tokens": 12 * WINDOW, "selection_tokens": 4 * WINDOW, **fields},
    )
    return prepared(checked(spec, PLUGINS))


@pytest.fixture(scope="module")
def straight(texts, tmp_path_factory):
    """The experiment of `setup` without more options, and the folder that it was made in; nobody changes them."""
    folder = tmp_path_factory.mktemp("straight")
    return setup(texts, folder), folder


def contained(windows, text):
    """For each window, whether all of it is in the windows `text`."""
    width = windows.shape[1]
    return torch.isin(shingles(windows, width), shingles(text, width)).all(dim=1)


def test_windows_are_prompts_that_go_on(texts, straight):
    """A sampled window begins with a span of a calibration window and is no real text; selection windows are real."""
    experiment, _ = straight
    pool, source = experiment.pools[0], experiment.real[0]
    assert pool.calibration.shape == (12, WINDOW)
    assert contained(pool.calibration[:, :PROMPT], source.calibration).all()
    assert not contained(pool.calibration, source.calibration).any()
    assert (pool.calibration < 256).all()
    assert torch.equal(pool.selection, source.selection)
    assert torch.equal(source.selection, real(texts).pools[0].selection)
    about = experiment.sampled[0]
    assert (about["windows"], about["real_windows"], about["drawn_tokens"]) == (12, 0, 12 * (WINDOW - PROMPT))
    assert about["forward_tokens"] == 3 * 5 * (WINDOW - 1) + WINDOW - 1  # three pieces, and the check of the cache
    assert "12 of 12 calibration windows sampled" in experiment.manifest()["calibration_notes"]["0"]


def test_seed_decides(texts, tmp_path):
    """The same seed gives the same tokens, another seed other ones; the first windows do not depend on the size."""
    first = setup(texts, tmp_path / "a", seeds=(0, 1))
    again = setup(texts, tmp_path / "b", pool_tokens=7 * WINDOW)
    assert torch.equal(first.pools[0].calibration[:7], again.pools[0].calibration)
    assert not torch.equal(first.pools[0].calibration, first.pools[1].calibration)
    alone = setup(texts, tmp_path / "c", learner=False)
    assert torch.equal(alone.pools[0].calibration, first.pools[0].calibration[:4])
    assert not len(alone.pools[0].selection)


def test_bos(texts, tmp_path):
    """With BOS every window begins with it, is as long as without, and goes on from BOS and a prompt."""
    experiment = setup(texts, tmp_path, bos="always")
    pool = experiment.pools[0]
    assert pool.bos and pool.calibration.shape == (12, WINDOW)
    assert (pool.calibration[:, 0] == BOS).all() and (pool.calibration[:, 1:] < 256).all()
    assert contained(pool.calibration[:, 1 : 1 + PROMPT], experiment.real[0].calibration).all()


def test_real_share(texts, straight, tmp_path):
    """Real windows are the first ones of the real pool, at their places among the samples."""
    experiment = setup(texts, tmp_path, ",real=0.25")
    calibration, source = experiment.pools[0].calibration, real(texts).pools[0].calibration
    places = torch.tensor(real_places(12, 0.25))
    assert torch.equal(calibration[places], source[:3])
    assert torch.equal(calibration[~places], straight[0].pools[0].calibration[:9])
    assert experiment.sampled[0]["real_windows"] == 3


def test_more_samples_than_text(texts, tmp_path):
    """A pool may be larger than its text: prompts come from windows in turn. What must be real must be there."""
    short = tmp_path / "short.txt"
    short.write_text((texts / "cal.txt").read_text(encoding="utf-8")[: 7 * WINDOW], encoding="utf-8")
    (tmp_path / "test.txt").write_text((texts / "test.txt").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "cal.txt").write_text(short.read_text(encoding="utf-8"), encoding="utf-8")
    experiment = setup(tmp_path, tmp_path / "out", pool_tokens=20 * WINDOW)
    assert len(experiment.pools[0].calibration) == 20
    assert len(experiment.real[0].calibration) == 2
    with pytest.raises(NMBenchError, match=r"gives \d windows of 64 tokens.*are needed"):
        setup(tmp_path, tmp_path / "out", ",real=0.5", pool_tokens=20 * WINDOW)
    with pytest.raises(NMBenchError, match=r"gives \d windows of 64 tokens.*are needed"):
        setup(tmp_path, tmp_path / "out", selection_tokens=40 * WINDOW)


def test_interrupted_sampling_goes_on(texts, straight, tmp_path, monkeypatch):
    """Killed between two pieces or while a file is written: the same tokens and cost, and finished pieces are kept."""
    straight, _ = straight
    drawn, made = Sampler.drawn, []

    def noted(sampler, index, *rest):
        made.append(index)
        if made == [0, 1]:
            raise KeyboardInterrupt
        return drawn(sampler, index, *rest)

    monkeypatch.setattr(Sampler, "drawn", noted)
    with pytest.raises(KeyboardInterrupt):
        setup(texts, tmp_path / "out")
    (tmp_path / "out/sampled/.seed0.piece1.0123.safetensors.half").write_bytes(b"half")
    resumed = setup(texts, tmp_path / "out")
    assert made == [0, 1, 1, 2]
    assert resumed.pools[0].digest == straight.pools[0].digest
    assert resumed.sampled[0]["forward_tokens"] == straight.sampled[0]["forward_tokens"]
    assert setup(texts, tmp_path / "out").sampled == resumed.sampled
    assert made == [0, 1, 1, 2]


def piece(folder, index):
    """The file of one piece of seed 0."""
    (path,) = folder.glob(f"seed0.piece{index}.*.safetensors")
    return path


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # a token of the last window
    path.write_bytes(content)


def test_other_prompts_leave_the_pieces_alone(texts, tmp_path):
    """Where the text of the prompts has changed, other pieces are sampled, and those of the run are not lost."""
    for name in ("cal", "test"):
        (tmp_path / f"{name}.txt").write_text((texts / f"{name}.txt").read_text(encoding="utf-8"), encoding="utf-8")
    before = setup(tmp_path, tmp_path / "out").pools[0].digest
    text = (tmp_path / "cal.txt").read_text(encoding="utf-8")
    (tmp_path / "cal.txt").write_text(text[1:], encoding="utf-8")
    assert setup(tmp_path, tmp_path / "out").pools[0].digest != before
    assert len(list((tmp_path / "out/sampled").iterdir())) == 6
    (tmp_path / "cal.txt").write_text(text, encoding="utf-8")
    assert setup(tmp_path, tmp_path / "out").pools[0].digest == before


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flipped, "it is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "cannot read"),
        (lambda path: path.write_bytes(piece(path.parent, 2).read_bytes()), "it holds windows of another model"),
    ],
)
def test_damaged_piece_is_sampled_again(texts, straight, tmp_path, capsys, damage, said):
    """A piece whose file is damaged, or is that of another piece, is sampled again, and a notice says so."""
    before, folder = straight
    out = shutil.copytree(folder, tmp_path / "out")
    assert "NOTICE" not in capsys.readouterr().err
    damage(piece(out / "sampled", 1))
    again = setup(texts, out)
    assert again.pools[0].digest == before.pools[0].digest
    said_all = capsys.readouterr().err
    assert said in said_all and said_all.count("NOTICE") == 1


def test_options_are_the_protocol(texts, tmp_path):
    """Options change tokens and protocol, equal values change nothing, and a directory holds one protocol."""
    experiments = [setup(texts, tmp_path / str(n), text) for n, text in enumerate(("", ",temperature=1", ",top_p=0.5"))]
    digests = [e.protocol_digest for e in experiments]
    assert digests[0] == digests[1] != digests[2]
    assert experiments[0].spec == experiments[1].spec
    assert experiments[0].pools[0].digest == experiments[1].pools[0].digest != experiments[2].pools[0].digest
    assert real(texts).protocol_digest not in digests
    with RunDirectory(tmp_path / "0") as directory:
        directory.adopt(experiments[0].spec, experiments[0].manifest())
    with pytest.raises(RunMismatch, match="calibration was"):
        setup(texts, tmp_path / "0", ",top_p=0.5")
    assert len(list((tmp_path / "0/sampled").iterdir())) == 3


def test_special_tokens_are_not_drawn(texts, tmp_path, monkeypatch):
    """Tokens that end, begin or pad a text are never drawn; a model that would draw little else is refused."""
    experiment = real(texts)
    assert special_tokens(experiment.bundle) == {BOS}
    monkeypatch.setattr(sampled_pieces, "special_tokens", lambda bundle: set(range(200)))
    with pytest.raises(NMBenchError, match=r"ends its text instead of going on: .* have \d+% of the probability"):
        setup(texts, tmp_path)
    monkeypatch.setattr(sampled_pieces, "special_tokens", lambda bundle: set(range(100)))
    calibration = setup(texts, tmp_path / "b").pools[0].calibration
    assert (calibration[:, PROMPT:] >= 100).all()


def test_the_same_text_again_and_again(texts, tmp_path, monkeypatch):
    """Samples that repeat others are drawn again up to a limit, and then refused with what they repeat."""
    windows = Sampler.drawn

    def same(sampler, index, *rest):
        return windows(sampler, 0, *rest)

    monkeypatch.setattr(Sampler, "drawn", same)
    monkeypatch.setattr(Sampler, "prompts", lambda self, index, prompts=Sampler.prompts: prompts(self, 0))
    with pytest.raises(NMBenchError, match=r"gives only 5 of 12 windows after 50 samples, .* earlier samples \(45\)"):
        setup(texts, tmp_path)


def test_broken_cache_is_refused(texts, tmp_path, monkeypatch):
    """A model that computes other logits with its cache than without is refused."""
    monkeypatch.setattr(sampled_pieces, "run_model", lambda model, tokens: model(input_ids=tokens.flip(1)))
    with pytest.raises(NMBenchError, match="computes other logits with its key-value cache than without"):
        setup(texts, tmp_path)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.cuda.OutOfMemoryError("no"), "lacks memory to sample 5 windows of 64 tokens at once; choose a smaller"),
        (RuntimeError("no"), "fails while text is sampled from it: RuntimeError: no"),
        (None, "are NaN while text is sampled from it"),
    ],
)
def test_a_model_that_fails(texts, tmp_path, monkeypatch, error, said):
    """Lack of memory, an error of the model and logits that are NaN are one line each, and no piece is kept."""

    def failing(model, prompts, length, choose, report):
        if error:
            raise error
        choose(torch.full((len(prompts), 257), torch.nan))
        return Continuation(prompts, 0, torch.zeros(len(prompts), 257))

    monkeypatch.setattr(sampled_pieces, "continued", failing)
    monkeypatch.setattr(sampled_pieces, "check_cache", lambda bundle, found: 0)
    with pytest.raises(NMBenchError, match=said):
        setup(texts, tmp_path)
    assert not list(tmp_path.glob("sampled/*"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"options": ",prompt=64"}, "option self.prompt is 64 tokens, and windows have 64 tokens of text"),
        ({"options": ",prompt=63", "bos": "always"}, "option self.prompt is 63 tokens, and windows have 63 tokens"),
        ({"stream": True, "learner": False}, "needs the whole model on the device"),
    ],
)
def test_refusals(texts, tmp_path, fields, said):
    """Prompts that leave nothing to sample, and blocks that are not on the device, are one line."""
    with pytest.raises(NMBenchError, match=said.replace("(", r"\(")):
        setup(texts, tmp_path, **fields)
    assert not (tmp_path / "sampled").exists()


def test_only_calibration_is_sampled(texts):
    """Sampled text is no test text, and its prompts are not from sampled text."""
    spec = RunSpec((MethodSpec.parse("wanda"),), "tiny:llama", calibration="self:self:demo")
    with pytest.raises(NMBenchError, match="takes its prompts from text that is sampled itself"):
        checked(spec, PLUGINS)
    spec = RunSpec((MethodSpec.parse("wanda"),), "tiny:llama", metrics=("ppl:self:demo@64",))
    with pytest.raises(NMBenchError, match="is for --calibration only: test text must be real text"):
        prepared(checked(spec, PLUGINS))
    with pytest.raises(NMBenchError, match="unknown data set 'dmeo'"):
        checked(RunSpec((MethodSpec.parse("wanda"),), "tiny:llama", calibration="self:dmeo"), PLUGINS)
