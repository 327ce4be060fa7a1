"""Columns beside a prompt or a conversation that change what it means: system, history, input; and those left alone."""

from __future__ import annotations

import datasets
import pytest
from data_cases import ANSWER, CONVERSATION, QUESTION, TURNS, encode, read, texts, write

from hdpissa.engine.data_formats import Fields, recognise
from hdpissa.engine.errors import ConfigError
from hdpissa.launch.train_data import tell_sources


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


def table(*rows) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(rows))


# LLaMA-Factory's alpaca; the first row has nothing but what every row must have
ALPACA = [
    {"instruction": "q", "input": "", "output": "a", "system": "", "history": []},
    {"instruction": "q", "input": "i", "output": "b", "system": "S", "history": [["p", "x"], ["r", "y"]]},
]


@pytest.mark.parametrize("source", ["jsonl", "csv", "parquet", "saved"])
def test_system_and_history_of_alpaca_rows(tmp_path, source):
    path = write(ALPACA, tmp_path, source)
    chats = read(path, chat_template="tokenizer")
    assert texts(chats.train) == [
        "[user]q</s>[assistant]«a</s>»",
        "[system]S</s>[user]p</s>[assistant]x</s>[user]r</s>[assistant]y</s>[user]q\ni</s>[assistant]«b</s>»",
    ]
    assert chats.sources[0]["format"] == "alpaca (columns instruction, input, output, system, history)"
    plain = read(path, prompt_template="<{instruction}>")
    assert texts(plain.train) == ["<s><q>«a\n</s>»", "<s>S\n\n<q\ni>«b\n</s>»"]
    told = "alpaca (columns instruction, input, output, system); history is not read, --chat_template reads it; "
    assert told in tell_sources(plain.sources)[0]


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (
            {"instruction": "a", "response": "b", "input": "c", "system": "d", "history": []},
            "alpaca (columns instruction, response); input, system, history are not read, --dataset_format alpaca "
            "reads them",
        ),
        (
            {"instruction": "a", "output": "b", "system": 3, "history": "long ago"},
            "alpaca (columns instruction, output); system, history are not read",
        ),
        ({"instruction": "a", "output": "b", "system": None, "history": None}, "instruction, output, system, history)"),
        ({"messages": [QUESTION], "system": "s", "tools": []}, "messages (columns messages, system, tools)"),
        ({"messages": [QUESTION], "system": ["s"]}, "messages (column messages); system is not read"),
        (
            {"prompt": [QUESTION], "completion": [ANSWER], "system": "s"},
            "prompt_completion (columns prompt, completion, system)",
        ),
        (
            {"prompt": "q", "completion": "a", "system": "s"},
            "prompt_completion (columns prompt, completion); system is not read",
        ),
    ],
)
def test_what_is_read_and_what_is_not_is_told(first, expected):
    assert str(recognise(first, Fields())).endswith(expected)


def test_named_columns_are_no_others():
    format = recognise({"system": "q", "history": "a", "input": ""}, Fields("system", "history", given=True))
    assert str(format) == "alpaca (columns system, history); input is not read, --dataset_format alpaca reads it"


def test_a_system_column_beside_a_conversation():
    """A system turn of the conversation's own stays the only one."""
    plain, expected = CONVERSATION[1:], TURNS.removeprefix("[system]s</s>")
    rows = table({"messages": plain, "system": "S"}, {"messages": plain, "system": ""}, {"messages": CONVERSATION})
    assert texts(encode(rows)) == [f"[system]S</s>{expected}", expected, TURNS]
    both = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    rows = table({"conversations": both[1:], "system": "S"}, {"conversations": both, "system": "S"})
    assert [text[:12] for text in texts(encode(rows))] == ["[system]S</s", "[system]s</s"]
    assert all(text.count("[system]") == 1 for text in texts(encode(rows)))
    rows = table({"prompt": [QUESTION], "completion": [ANSWER], "system": "S"})
    assert texts(encode(rows)) == ["[system]S</s>[user]q</s>[assistant]«a</s>»"]


def test_a_history_that_is_none_is_refused_with_its_row(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('instruction,output,history\nq,a,[]\nq,a,"[""q"", ""a""]"\n')
    with pytest.raises(ConfigError, match=r"row 1 \(from 0\) has no list of \[instruction, answer\] pairs .*'history'"):
        read(path, chat_template="tokenizer")
