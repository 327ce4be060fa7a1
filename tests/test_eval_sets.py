"""Evaluation sets with columns, a format, a configuration or a revision of their own: --eval_dataset_… and so on."""

from __future__ import annotations

from types import SimpleNamespace

import datasets
import pytest
from data_cases import CHAT, ROWS, character_tokenizer, jsonl, parse, read, texts

from hdpissa.engine.errors import ConfigError
from hdpissa.launch.train_data import read_rows, tell_rows, tell_sources
from hdpissa.launch.train_questions import read_questions

MATH = [{"query": "q", "response": "a"}]  # the columns of MetaMathQA
GSM = [{"question": "q", "answer": "a", "text": "t"}]
COLUMNS = {"prompt_field": "query", "response_field": "response", "prompt_template": "none"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


def test_evaluation_rows_have_columns_and_a_format_of_their_own(tmp_path):
    """As MetaMathQA and GSM8K; of what is not said the training set's value holds."""
    math, gsm = jsonl(tmp_path, "math", MATH), jsonl(tmp_path, "gsm", GSM)
    both = {"eval_dataset_name": str(gsm), "eval_prompt_field": "question", "eval_response_field": "answer"}
    found = read(math, **COLUMNS, **both)
    assert texts(found.held_out) == texts(found.train) == ["<s>q«a\n</s>»"]
    assert "alpaca (columns question, answer)" in tell_sources(found.sources)[1]
    half = jsonl(tmp_path, "half", [{"question": "q", "response": "b"}])
    found = read(math, **COLUMNS, eval_dataset_name=str(half), eval_prompt_field="question")
    assert texts(found.held_out) == ["<s>q«b\n</s>»"]
    half = jsonl(tmp_path, "other_half", [{"query": "q", "answer": "c"}])
    found = read(math, **COLUMNS, eval_dataset_name=str(half), eval_response_field="answer")
    assert texts(found.held_out) == ["<s>q«c\n</s>»"]
    found = read(math, **COLUMNS, eval_dataset_name=str(gsm), eval_dataset_format="text")
    assert texts(found.held_out) == ["«<s>t</s>»"]
    chats = jsonl(tmp_path, "chats", ROWS["messages"][0])
    several = {"eval_dataset_name": f"{gsm} {math} {chats}", "eval_prompt_field": "question query -"}
    found = read(chats, **several, eval_response_field="answer response -", prompt_template="none")
    assert [source["format"].split(";")[0] for source in found.sources[1:]] == [
        "alpaca (columns question, answer)", "alpaca (columns query, response)", "messages (column messages)",
    ]  # fmt: skip
    assert texts(found.held_out)[:2] == ["<s>q«a\n</s>»"] * 2


def test_one_column_of_an_evaluation_set_is_as_strict_as_one_of_a_training_set(tmp_path):
    rows = jsonl(tmp_path, "rows", [{"instruction": "q", "response": "a"}])
    more = jsonl(tmp_path, "more", [{"question": "q", "output": "a"}])
    with pytest.raises(ConfigError, match=r"column 'response' .* set --eval_prompt_field and --eval_response_field"):
        read(rows, eval_dataset_name=str(more), eval_prompt_field="question")


def test_a_configuration_and_a_revision_are_of_one_set(monkeypatch):
    """What is inside one set can be true of no other; there is no hub in tests, so that what it is asked for counts."""
    asked = []

    def load(**named):
        asked.append((named["path"], named["name"], named["revision"], named["split"]))
        return datasets.Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    own = {"dataset_config": "v2", "dataset_revision": "sha", "dataset_split": "test"}
    read("a", **own, eval_dataset_name="a org/gsm")
    assert asked[1:] == [("a", "v2", "sha", "train"), ("org/gsm", None, None, "train")]
    asked.clear()
    read("a", **own, eval_dataset_name="org/gsm a", eval_dataset_config="main -", eval_dataset_revision="v3 v4")
    assert asked[1:] == [("org/gsm", "main", "v3", "train"), ("a", None, "v4", "train")]


def asked_of_the_hub(monkeypatch) -> list:
    """(name, configuration, split) of each set, in the order in which they are asked for."""
    asked = []

    def load(**named):
        asked.append((named["path"], named["name"], named["split"]))
        return datasets.Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_a_set_that_is_named_twice_is_evaluated_by_its_place(monkeypatch):
    """Two configurations are two sets; the same rows twice are one."""
    asked = asked_of_the_hub(monkeypatch)
    read("a b a", dataset_config="x - y", eval_split="test")
    assert asked[3:] == [("a", "x", "test"), ("b", None, "test"), ("a", "y", "test")]
    asked.clear()
    read("a a:1 b", eval_split="test")
    assert asked[3:] == [("a", None, "test"), ("b", None, "test")]
    asked.clear()
    read("a a", dataset_config="x y", eval_dataset_name="a a c", eval_split="test")
    assert asked[2:] == [("a", "x", "test"), ("a", "y", "test"), ("c", None, "test")]


def test_a_split_for_each_evaluation_set(monkeypatch):
    asked = asked_of_the_hub(monkeypatch)
    read("a", eval_dataset_name="b c d", eval_split="test[:5] - valid")
    assert asked[1:] == [("b", None, "test[:5]"), ("c", None, "train"), ("d", None, "valid")]
    asked.clear()
    read("a b", eval_split="test valid")
    assert asked[2:] == [("a", None, "test"), ("b", None, "valid")]
    with pytest.raises(ConfigError, match=r"--eval_split is 'test valid': 2 values for 3 datasets; .* one for each"):
        read("a", eval_dataset_name="b c d", eval_split="test valid")


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"eval_split": "train[50%:]"}, True),
        ({"eval_split": "test + train[:5]"}, True),
        ({"eval_split": "train", "dataset_split": "train[:5]"}, True),
        ({"eval_split": "train[:5]", "dataset_split": "train[:5]"}, True),
        ({"eval_split": "train[50%:]", "dataset_split": "train[:50%]"}, False),
        ({"eval_split": "train[50%:]", "dataset_split": "train[:80%]"}, True),
        ({"eval_split": "train[5:]", "dataset_split": "train[:6]"}, True),
        ({"eval_split": "train[-4:]", "dataset_split": "train[:5]"}, False),
        ({"eval_split": "test"}, False),
        ({"eval_dataset_name": "b"}, False),
        ({"eval_dataset_name": "b a:9"}, True),
        ({"eval_dataset_name": "a", "dataset_config": "x", "eval_dataset_config": "y"}, False),
    ],
)
def test_rows_that_are_both_trained_and_evaluated_on_are_told(monkeypatch, options, warned):
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: datasets.Dataset.from_list([{"text": "a"}] * 9))
    found = read("a", **options)
    batches = SimpleNamespace(packed=False, dropped_samples=0)
    said = [line for line in tell_rows(found, batches) if line.startswith("warning: ")]
    assert len(said) == warned
    if warned:
        assert "evaluation data a" in said[0]
        assert f"{'may have' if ':9' in str(options) else 'have'} rows that are trained on" in said[0]


def test_two_names_of_one_file_are_one_set(tmp_path, monkeypatch):
    path = jsonl(tmp_path, "rows", [{"text": "a"}])
    monkeypatch.chdir(tmp_path)
    assert read(path, eval_dataset_name="rows.jsonl").warnings
    assert not read(path, eval_dataset_name=str(jsonl(tmp_path, "more", [{"text": "a"}]))).warnings


def test_the_option_that_asks_for_too_many_rows_is_named(tmp_path):
    path = jsonl(tmp_path, "rows", [{"text": "a"}])
    with pytest.raises(ConfigError, match=r"^--eval_dataset_name: .*rows\.jsonl:5 asks for 5 rows .* has 1"):
        read(path, eval_dataset_name=f"{path}:5")
    with pytest.raises(ConfigError, match=r"^--dataset_name: .*rows\.jsonl:5 asks for 5 rows"):
        read(f"{path}:5")


# --- questions -------------------------------------------------------------------------------------

HISTORY = "[system]s</s>[user]q</s>[assistant]a</s>[user]r</s>[assistant]"


@pytest.mark.parametrize(
    "asking", [{"eval_exact_match": True}, {"sample_steps": 2}], ids=lambda value: next(iter(value))
)
@pytest.mark.parametrize(
    ("format", "options", "prompts", "answers"),
    [
        ("alpaca", {"train_on_prompt": True}, ["<s><q>", "<s><q\ni>"], ["a", "b"]),
        ("alpaca", {"completion_only_loss": "false"}, ["<s><q>", "<s><q\ni>"], ["a", "b"]),
        ("prompt_completion", {"completion_only_loss": "false"}, ["<s>q ", "<s>r"], ["a", "b"]),
        ("messages", {"train_on_prompt": True}, [HISTORY] * 2, ["b", "b"]),
        ("messages", {"assistant_only_loss": "false"}, [HISTORY] * 2, ["b", "b"]),
    ],
)
def test_rows_are_asked_whatever_carries_loss(tmp_path, asking, format, options, prompts, answers):
    """As where only the answers do; and what carries loss stays what it is."""
    path = jsonl(tmp_path, format, ROWS[format][0])
    options = options | ({"prompt_template": "<{instruction}>"} if format == "alpaca" else {})
    args, given = parse(path, eval_dataset_name=path, **options, **asking)
    tokenizer = character_tokenizer(chat_template=CHAT)
    found = read_rows(args, given, tokenizer)
    assert all(row["labels"] == row["input_ids"] for row in found.held_out.dataset)
    graded, asked = read_questions(args, tokenizer, found)
    for questions in filter(None, (graded, asked)):
        assert ["".join(map(tokenizer.decode, question.ids)) for question in questions] == prompts
        assert [question.reference for question in questions] == answers
    assert (bool(graded), bool(asked)) == (bool(args.eval_exact_match), bool(args.sample_steps))


def test_why_rows_cannot_be_asked(tmp_path):
    """Where the template does not show where an answer begins, and where there is no prompt."""
    counting = {"chat_template": "{{ messages | length }}" + CHAT, "assistant_only_loss": "false"}
    told = r"^questions of dataset .*does not show .* marks them with {% generation %}; or ask no rows$"
    for format, options, message in (("messages", counting, told), ("text", {}, "no evaluation row has a prompt and")):
        path = jsonl(tmp_path, format, ROWS[format][0])
        args, given = parse(path, eval_dataset_name=path, eval_exact_match=True, **options)
        tokenizer = character_tokenizer(chat_template=CHAT)
        found = read_rows(args, given, tokenizer)
        with pytest.raises(ConfigError, match=message):
            read_questions(args, tokenizer, found)


def test_loss_on_turns_is_of_those_sets_of_a_mix_that_have_some(tmp_path):
    """And completions of those that have some; of a mix with neither each is refused."""
    chats = jsonl(tmp_path, "chats", ROWS["messages"][0])
    math, plain = jsonl(tmp_path, "math", MATH), jsonl(tmp_path, "plain", [{"text": "t"}])
    columns = {"prompt_field": "- query", "response_field": "- response", "prompt_template": "none"}
    found = read(f"{chats} {math}", **columns, assistant_only_loss="true")
    assert [source["loss_on"] for source in found.sources] == ["the assistant's turns", "the answer"]
    found = read(f"{plain} {math}", **columns, completion_only_loss="true")
    assert [source["loss_on"] for source in found.sources] == ["everything", "the answer"]
    with pytest.raises(ConfigError, match=r"--completion_only_loss: rows of .* have no completion"):
        read(f"{plain} {chats}", completion_only_loss="true")
    rows = jsonl(tmp_path, "rows", [{"instruction": "q", "response": "a"}])
    with pytest.raises(ConfigError, match=r"--completion_only_loss: rows of text .* have no completion"):
        read(plain, eval_dataset_name=str(rows), completion_only_loss="true")  # which no row that is trained on has
