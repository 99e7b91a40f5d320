"""Laws of zero-shot accuracy: the harness's own prompts on local items, scored as an independent script scores them."""

import importlib.util
import json
import math
import random
import re

import numpy
import pytest
import torch

import nmbench_plugins.zeroshot as plugin
from nmbench.errors import NMBenchError
from nmbench.evaluation.subject import DenseSubject, Subject
from nmbench_plugins.tiny import TinyModel
from nmbench_plugins.zeroshot import WordPerplexity, ZeroShot
from nmbench_plugins.zeroshot import harness as zeroshot_harness
from nmbench_plugins.zeroshot.harness import indexed, stock_definition
from nmbench_plugins.zeroshot.items import TASKS, check, read

harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed: extra zeroshot"
)
loud = pytest.mark.filterwarnings("ignore")  # those of the harness and of what it imports

ITEMS = {
    "arc_easy": {
        "question": "Which of these {} is wet?",
        "choices": ["a stone", "the water", "some dry sand"],
        "gold": 1,
    },
    "openbookqa": {"question": "Predators {} eat", "choices": ["lions", "bunnies", "stones", "light"], "gold": 1},
    "hellaswag": {
        "activity_label": "Cooking {}",
        "ctx_a": "A man is in a kitchen.",
        "ctx_b": "he",
        "endings": ["cooks.", "flies to the moon.", "is a fish.", "sleeps [title] standing."],
        "label": "0",
    },
    "piqa": {"goal": "open {} doors", "sol1": "push the handle", "sol2": "eat the handle", "label": 0},
    "winogrande": {"sentence": "Ann met Eve {} and _ left.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    "boolq": {"question": "is {} water wet", "passage": "Water is wet.", "answer": True},
    "lambada_openai": {"text": "The {} king went to see the king"},
}


@pytest.fixture(autouse=True)
def no_description_of_the_machine(monkeypatch):
    """Pip and ten other programs are not started, as the harness does at every call, for a log of its own."""
    monkeypatch.setattr("torch.utils.collect_env.get_pip_packages", lambda run, patterns=None: ("pip", ""))
    monkeypatch.setattr("torch.utils.collect_env.run", lambda command: (1, "", ""))


@pytest.fixture
def items(tmp_path):
    """A folder with six items of every task."""
    for task, item in ITEMS.items():
        (tmp_path / "items" / task).mkdir(parents=True)
        lines = [json.dumps(item).replace("{}", word) for word in ("one", "two", "three", "four", "five", "six")]
        path = tmp_path / "items" / task / f"{TASKS[task][0]}.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "items"


def measured(metric, family="llama"):
    subject = Subject(TinyModel().load(family), {})
    found = metric.measure(subject, DenseSubject({}))
    return found, subject


def log_likelihood(bundle, context, continuation):
    """Sum of log p of the tokens of `continuation` after `context`, in float64, one token at a time."""
    start = bundle.tokenizer(context)["input_ids"]
    tokens = bundle.tokenizer(context + continuation)["input_ids"]
    log_p = bundle.model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return sum(float(log_p[i - 1, tokens[i]]) for i in range(len(start), len(tokens)))


@harness
@loud
def test_scores_are_those_of_an_independent_script(items):
    """acc is whether the gold choice is the likeliest, acc_norm the same per byte, on the harness's prompts."""
    found, subject = measured(ZeroShot(f"{items}/arc_easy@5"))
    bundle, right, right_by_length = TinyModel().load("llama"), [], []
    for line in (items / "arc_easy" / "test.jsonl").read_text().splitlines()[:5]:
        item = json.loads(line)
        context = f"Question: {item['question']}\nAnswer:"
        scores = [log_likelihood(bundle, context, f" {choice}") for choice in item["choices"]]
        by_length = [score / len(choice.encode()) for score, choice in zip(scores, item["choices"], strict=True)]
        right.append(scores.index(max(scores)) == item["gold"])
        right_by_length.append(by_length.index(max(by_length)) == item["gold"])
    name = f"zeroshot:{items}/arc_easy@5"
    assert subject.per_window[f"{name} acc"].tolist() == right
    assert subject.per_window[f"{name} acc_norm"].tolist() == right_by_length
    accuracy = found[f"{name} acc"]
    assert accuracy.value == sum(right) / 5
    assert (accuracy.n, accuracy.lower_is_better) == (5, False)
    assert accuracy.about["task_version"] == 1.0
    assert accuracy.about["lm_eval"].startswith("0.")


@harness
@loud
@pytest.mark.parametrize("task", sorted(ITEMS))
def test_every_task_runs_offline(items, task, monkeypatch):
    """All tasks are evaluated on local items, all six without a limit; figures are shares of whole items."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found, _ = measured(ZeroShot(f"{items}/{task}"))
    assert next(iter(found)) == f"zeroshot:{items}/{task} acc"
    for value in found.values():
        assert value.n == 6
        assert (value.value * 6) == pytest.approx(round(value.value * 6))


PAGES = ("The king met Eve in a wet wood. They saw no one and went home\n", "Water is wet; a stone is dry")


@harness
@loud
def test_word_perplexity_is_that_of_an_independent_script(tmp_path):
    """The loss of all bytes after BOS, summed over the documents, divided by the words that white space divides."""
    (tmp_path / "wikitext").mkdir()
    (tmp_path / "wikitext/test.jsonl").write_text("".join(json.dumps({"page": page}) + "\n" for page in PAGES))
    found, subject = measured(WordPerplexity(f"{tmp_path}/wikitext"))
    bundle = TinyModel().load("llama")
    nats, words = [], []
    for page in PAGES:
        text = page.replace(" ; ", "; ")
        nats.append(-log_likelihood(bundle, "", text))
        words.append(len(re.split(r"\s+", page)))
    value = found[f"wordppl:{tmp_path}/wikitext"]
    assert value.value == pytest.approx(math.exp(sum(nats) / sum(words)), rel=1e-5)
    assert (value.n, value.lower_is_better, value.unit) == (2, True, "per word")
    assert value.about["words"] == sum(words)
    assert not subject.per_window
    one = WordPerplexity(f"{tmp_path}/wikitext@1").measure(subject, DenseSubject({}))
    assert one[f"wordppl:{tmp_path}/wikitext@1"].stderr is None


@harness
@loud
def test_word_perplexity_of_what_has_none(items, tmp_path):
    """A task with answers, a page without a word, and an accuracy of pages are refused in one line."""
    with pytest.raises(NMBenchError, match="arc_easy of lm-evaluation-harness has no word perplexity; give wikitext"):
        measured(WordPerplexity(f"{items}/arc_easy"))
    (tmp_path / "wikitext").mkdir()
    for content, metric, message in (
        ('{"page": " "}', WordPerplexity, "line 1 is not an item of wikitext: ValueError its page holds no word"),
        ('{"page": "a b"}', ZeroShot, "wikitext of lm-evaluation-harness has no accuracy"),
    ):
        (tmp_path / "wikitext/test.jsonl").write_text(content)
        with pytest.raises(NMBenchError, match=message):
            measured(metric(f"{tmp_path}/wikitext"))


@harness
@loud
@pytest.mark.slow
def test_definitions_are_those_of_the_index():
    """The file found for a task is the one that the harness's own index names."""
    assert {task: stock_definition(task) for task in TASKS} == {task: indexed(task) for task in TASKS}


@harness
@loud
@pytest.mark.parametrize("found", [[], ["one.yaml", "other.yaml"]], ids=["none", "two"])
def test_the_index_decides_where_names_do_not(monkeypatch, found):
    """Where no file or several files name a task, the index of the harness is asked."""
    monkeypatch.setattr(zeroshot_harness, "definitions", lambda: {"piqa": found})
    monkeypatch.setattr(zeroshot_harness, "indexed", lambda task: f"the file of {task}")
    assert stock_definition("piqa") == "the file of piqa"


@harness
@loud
def test_nothing_is_left_behind(items, capfd):
    """Random states, weights and tokenizer are as before, and the error stream is empty."""
    bundle = TinyModel().load("llama")
    digest, vocabulary = bundle.digest(), len(bundle.tokenizer)
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    ZeroShot(f"{items}/piqa@2").measure(Subject(bundle, {}), DenseSubject({}))
    assert (bundle.digest(), len(bundle.tokenizer)) == (digest, vocabulary)
    assert bundle.tokenizer.pad_token is None
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert capfd.readouterr().err == ""


@harness
@loud
def test_through_the_command_line(items, nmbench, small, records, tmp_path):
    """A run shows accuracy under its full name, ranks rows by it, and names harness and items in the manifest."""
    metric = f"zeroshot:{items}/piqa@4"
    result = nmbench("run", *small[: small.index("--set")], "--metric", metric, "--method", "magnitude", "--out", "out")
    assert result.exit_code == 0, result.output
    assert all(f"{metric} acc_norm" in record["metrics"] for record in records(tmp_path / "out"))
    assert f"2:4 {metric} acc:" in result.stdout
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert set(manifest["metric_provenance"][metric]) == {"lm_eval", "items_sha256"}


@harness
@loud
def test_other_items_are_another_protocol(items, nmbench, small, records, tmp_path):
    """If the items change, rows measured on the old ones are not taken for finished."""
    flags = ["run", *small[: small.index("--set")], "--metric", f"zeroshot:{items}/piqa@4", "--method", "magnitude"]
    assert nmbench(*flags, "--out", "out").exit_code == 0
    path = items / "piqa" / "validation.jsonl"
    path.write_text(path.read_text().replace("eat", "kick"), encoding="utf-8")
    assert nmbench(*flags, "--out", "out").exit_code == 0
    rows = records(tmp_path / "out")
    assert len(rows) == 4
    assert rows[0]["protocol_digest"] != rows[2]["protocol_digest"]


def test_items_take_the_form_of_the_hub(items):
    """Gold indices become the label of the gold choice, truth values labels; other items stay as they are."""
    first = read(items / "arc_easy")[0]
    assert first["choices"]["text"][first["choices"]["label"].index(first["answerKey"])] == "the water"
    assert read(items / "openbookqa")[0]["question_stem"] == "Predators one eat"
    assert read(items / "boolq")[0]["label"] == 1
    assert read(items / "piqa")[0]["sol2"] == "eat the handle"
    assert read(items / "arc_easy")[0]["question"] == "Which of these one is wet?"


@pytest.mark.parametrize("line", ["{", "[1]", "{}", '{"question": "x", "choices": ["a"], "gold": 7}'])
def test_broken_items_are_named(items, line):
    """A line that is no item is named with its file and number."""
    path = items / "arc_easy" / "test.jsonl"
    path.write_text(path.read_text() + line + "\n", encoding="utf-8")
    with pytest.raises(NMBenchError, match=r"arc_easy/test\.jsonl line 7 is not an item of arc_easy"):
        read(items / "arc_easy")


def test_folders_are_checked_at_once(items, monkeypatch):
    """A folder of an unknown name, or without its file, is refused when the metric is named."""
    monkeypatch.setattr(plugin.importlib.util, "find_spec", lambda name: "there")
    with pytest.raises(NMBenchError, match="no zero-shot task is known by the folder name 'items'"):
        ZeroShot(f"{items}")
    (items / "piqa" / "validation.jsonl").unlink()
    with pytest.raises(NMBenchError, match=r"piqa/validation\.jsonl do not exist"):
        check(items / "piqa")
    with pytest.raises(NMBenchError, match="not of the form"):
        ZeroShot("")


@pytest.mark.parametrize(
    ("argument", "task", "limit", "local"),
    [("arc_easy", "arc_easy", None, False), ("arc_easy@200", "arc_easy", 200, False), ("a@0", "a@0", None, False)],
)
def test_names(monkeypatch, argument, task, limit, local):
    """The limit stands after the last @; a name without a slash is a task of the harness."""
    monkeypatch.setattr(plugin.importlib.util, "find_spec", lambda name: "there")
    metric = ZeroShot(argument)
    assert (metric.task, metric.limit, metric.folder is not None) == (task, limit, local)


def test_without_the_harness(monkeypatch, nmbench):
    """The error says what to install, before a model is loaded."""
    monkeypatch.setattr(plugin.importlib.util, "find_spec", lambda name: None)
    result = nmbench("run", "--method", "magnitude", "--metric", "zeroshot:arc_easy")
    assert result.exit_code == 1
    assert result.stderr == f"Error: {plugin.MISSING}\n"
    assert "pip install 'nmbench[zeroshot]'" in plugin.MISSING


GOLD = {
    "arc_easy": {"gold": -1},
    "openbookqa": {"gold": 4},
    "hellaswag": {"label": "-1"},
    "piqa": {"label": -1},
    "winogrande": {"answer": ""},
    "boolq": {"label": -1},
    "lambada_openai": {"text": ""},
}


@pytest.mark.parametrize("task", sorted(GOLD))
def test_items_without_a_gold_answer(items, task):
    """A gold answer that is none of the choices is named with its line, and never counts as right."""
    path = items / task / f"{TASKS[task][0]}.jsonl"
    path.write_text(path.read_text() + json.dumps({**ITEMS[task], **GOLD[task]}) + "\n", encoding="utf-8")
    with pytest.raises(NMBenchError, match=rf"{task}/\w+\.jsonl line 7 is not an item of {task}: .* gold answer"):
        read(items / task)


def test_items_of_the_hub_need_one_too(items):
    """An answer key that labels no choice is refused; one that does is kept."""
    hub = {"question": "x", "choices": {"text": ["a", "b"], "label": ["1", "2"]}}
    path = items / "arc_easy" / "test.jsonl"
    path.write_text(json.dumps({**hub, "answerKey": "2"}), encoding="utf-8")
    assert read(items / "arc_easy")[0]["answerKey"] == "2"
    path.write_text(json.dumps({**hub, "answerKey": ""}), encoding="utf-8")
    with pytest.raises(NMBenchError, match="gold answer '' is none of its choices"):
        read(items / "arc_easy")


def test_a_folder_does_not_shadow_a_task(items, monkeypatch):
    """A name is a task of the harness though a folder of that name exists; only a path names a folder."""
    monkeypatch.setattr(plugin.importlib.util, "find_spec", lambda name: "there")
    monkeypatch.chdir(items)
    assert ZeroShot("arc_easy").folder is None
    assert ZeroShot("./arc_easy@3").folder == plugin.Path("arc_easy")
    assert ZeroShot("../items/arc_easy").folder == plugin.Path("../items/arc_easy")
    monkeypatch.setenv("HOME", str(items))
    assert ZeroShot("~/arc_easy").folder == items / "arc_easy"
    monkeypatch.chdir(items.parent)
    with pytest.raises(NMBenchError, match=r"a folder begins with \./ or /, for example zeroshot:\./items/arc_easy"):
        ZeroShot("items/arc_easy")


@harness
@loud
def test_items_longer_than_the_context(items):
    """Items that lose their beginning are counted in the record and beside the figure; others are not."""
    path = items / "arc_easy" / "test.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = lines[2].replace("wet?", "wet? " * 300)
    path.write_text("\n".join(lines), encoding="utf-8")
    found, _ = measured(ZeroShot(f"{items}/arc_easy"))
    for value in found.values():
        assert value.about["cut_items"] == 1
        assert value.where == "1 items cut to the context of 512 tokens"
    found, _ = measured(ZeroShot(f"{items}/arc_easy@2"))
    assert all(not {"cut_items", "where"} & value.recorded().keys() for value in found.values())


@harness
@loud
def test_a_tokenizer_without_an_end_of_text(items):
    """A tokenizer that has no token to pad with gives the same answers."""
    wanted, _ = measured(ZeroShot(f"{items}/arc_easy"))
    bundle = TinyModel().load("llama")
    bundle.tokenizer.eos_token = None
    bundle.tokenizer.bos_token = None
    assert not any((bundle.tokenizer.pad_token, bundle.tokenizer.unk_token, bundle.tokenizer.eos_token))
    found = ZeroShot(f"{items}/arc_easy").measure(Subject(bundle, {}), DenseSubject({}))
    assert {name: value.value for name, value in found.items()} == {n: v.value for n, v in wanted.items()}
