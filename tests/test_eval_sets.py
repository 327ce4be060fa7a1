"""Evaluation sets with columns, a format, a configuration or a revision of their own: --eval_dataset_… and so on."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from data_cases import CHAT, ROWS, character_tokenizer, texts
from launch_runs import flags

from hdpissa.engine.errors import ConfigError
from hdpissa.launch import train_arguments
from hdpissa.launch.train_data import read_rows, tell_sources
from hdpissa.launch.train_questions import read_questions

MATH = [{"query": "q", "response": "a"}]  # the columns of MetaMathQA
GSM = [{"question": "q", "answer": "a", "text": "t"}]
COLUMNS = {"prompt_field": "query", "response_field": "response", "prompt_template": "none"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


def read(source, **options):
    """What train.py's own command line reads."""
    args, given = parse(source, **options)
    return read_rows(args, given, character_tokenizer(chat_template=CHAT))


def parse(source, **options):
    required = {"ds_config": "a.json", "model_name_or_path": "m", "output_dir": "o", "dataset_name": str(source)}
    return train_arguments.parse(flags(required | options))


def jsonl(folder: Path, name: str, rows) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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
