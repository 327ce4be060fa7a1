"""Options that would count for nothing: refused where that is a mistake, told where a config may be shared."""

from __future__ import annotations

from types import SimpleNamespace

import datasets
import pytest
from data_cases import CHAT, ROWS, character_tokenizer, jsonl, parse, texts
from launch_runs import flags, make_inputs, train_here
from mistakes import argument, assert_told, collect
from ranks import run_ranks

from hdpissa.launch import train_arguments
from hdpissa.launch.train_checks import check
from hdpissa.launch.train_data import read_rows
from hdpissa.launch.train_notes import notes


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


# --- refused ---------------------------------------------------------------------------------------

MESSAGES, PAIRS, TEXT = "DIR/messages.jsonl", "DIR/prompt_completion.jsonl", "DIR/text.jsonl"
CHATTING = {"dataset_name": MESSAGES, "eval_dataset_name": None, "model_name_or_path": "DIR/chat"}
CASES = [
    argument(
        "a prompt template for messages",
        ("--prompt_template '<{instruction}>' is for alpaca rows", "messages (column messages)", "leave it out"),
        **CHATTING,
        prompt_template="<{instruction}>",
    ),
    argument(
        "a prompt template for prompts and completions",
        ("--prompt_template 'none' is for alpaca rows", "prompt_completion"),
        dataset_name=PAIRS,
        eval_dataset_name=None,
        prompt_template="none",
    ),
    argument(
        "a chat template for text",
        ("--chat_template", "is for conversations and alpaca rows", "text (column text)"),
        dataset_name=TEXT,
        eval_dataset_name=None,
        chat_template=CHAT,
    ),
    argument(
        "a chat template for plain prompts, streamed",
        ("--chat_template", "prompt_completion (columns prompt, completion)"),
        dataset_name=PAIRS,
        eval_dataset_name=None,
        chat_template=CHAT,
        streaming=True,
    ),
    argument(
        "columns of a prompt for messages",
        ("--prompt_field 'x' is for alpaca rows", "--dataset_format"),
        **CHATTING,
        prompt_field="x",
        response_field="y",
        dataset_format="messages",
    ),
    argument(
        "columns of a prompt for evaluation rows of text",
        ("--eval_response_field 'y' is for alpaca rows", "none (text (column text));", "--eval_dataset_format"),
        eval_dataset_name=TEXT,
        eval_dataset_format="text",
        eval_response_field="y",
    ),
    argument(
        "a column of text for messages",
        ("--dataset_text_field 'zzz' is for rows of text",),
        **CHATTING,
        dataset_text_field="zzz",
    ),
    argument(
        "answers that nobody grades",
        ("--eval_exact_match with --eval_strategy no", "leave one of them out"),
        eval_exact_match=True,
        eval_strategy="no",
    ),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unread") / "inputs"
    inputs = make_inputs(folder, train=16, evaluate=4)
    for name in ("messages", "prompt_completion", "text"):
        jsonl(folder, name, ROWS[name][0])
    (folder / "chat").mkdir()
    for file in (folder / "model").iterdir():
        (folder / "chat" / file.name).write_bytes(file.read_bytes())
    (folder / "chat" / "chat_template.jinja").write_text(CHAT)
    return collect(CASES, folder, inputs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.mistake)
def test_one_line_and_exit_code_2(results, case):
    assert_told(case, results[case.mistake])


# --- used by one set of several, or as it is by default ------------------------------------------------


@pytest.mark.parametrize("mix", ["{alpaca} {messages}", "{messages} {alpaca}"])
def test_one_set_of_a_mix_is_enough(tmp_path, mix):
    paths = {name: jsonl(tmp_path, name, ROWS[name][0]) for name in ("alpaca", "messages", "text")}
    tokenizer = character_tokenizer(chat_template=CHAT)
    args, given = parse(mix.format(**paths), prompt_template="<{instruction}>", dataset_text_field="text")
    assert sum(text.startswith("<s><q") for text in texts(read_rows(args, given, tokenizer).train)) == 2
    # the evaluation rows alone have a text
    args, given = parse(paths["alpaca"], eval_dataset_name=paths["text"], dataset_text_field="text")
    assert read_rows(args, given, tokenizer).held_out is not None


def test_a_default_that_is_said_is_no_mistake(tmp_path):
    path = jsonl(tmp_path, "text", ROWS["text"][0])
    args, given = parse(path, prompt_template="alpaca", prompt_field="instruction", dataset_format="text")
    assert len(read_rows(args, given, character_tokenizer()).train.dataset) == 2


# --- told ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"warmup_steps": 300},
            ["the warm-up has 300 steps and the run 4: ", "ends at 1.0% of it"],
        ),
        ({"warmup_ratio": 1}, ["it ends at 75.0% of it"]),
        ({"warmup_steps": 3}, []),
        ({"warmup_steps": 3, "lr_scheduler_type": "constant"}, ["--warmup_steps 3 counts for nothing: constant has"]),
        ({"warmup_ratio": 0.03, "lr_scheduler_type": "constant"}, ["--warmup_ratio 0.03 counts for nothing"]),
        ({"eval_strategy": "no"}, ["the evaluation rows are read, and nothing is evaluated"]),
        ({"eval_strategy": "no", "sample_steps": 2}, []),
        ({"eval_strategy": "epoch", "eval_steps": 2}, ["--eval_steps 2 counts for nothing with --eval_strategy epoch"]),
        ({"save_strategy": "epoch", "save_steps": 2}, ["--save_steps 2 counts for nothing with --save_strategy epoch"]),
        ({"eval_steps": 2, "save_steps": 2, "lr_scheduler_type": "constant"}, []),
    ],
)
def test_what_counts_for_nothing_is_told(options, words):
    args, given = parse(**options)
    told = notes(args, given, SimpleNamespace(held_out=object()), 4)
    assert len(told) == bool(words)
    assert all(word in told[0] for word in words)


def test_notes_stand_before_a_preview(tmp_path):
    """On standard error, once, and the run goes on."""
    inputs = make_inputs(tmp_path / "inputs", train=16, evaluate=4)
    wanted = inputs | {"output_dir": str(tmp_path / "out"), "max_steps": 2, "warmup_steps": 30, "preview": 1}
    (done,) = run_ranks(1, train_here, flags(wanted), str(tmp_path / "cache"))
    assert (done["code"], done["error"]) == (0, None)
    assert done["stderr"].startswith("note: the warm-up has 30 steps and the run 2: ")
    assert done["stderr"].count("note: ") == 1


def test_shares_are_resolved_before_the_run(tmp_path):
    """By `check`, so that run.json, checkpoints and callbacks have numbers of steps."""
    inputs = make_inputs(tmp_path / "inputs", train=16, evaluate=4)
    shares = {"eval_steps": 0.1, "save_steps": 0.5, "logging_steps": 0.01}
    args, given = train_arguments.parse(flags(inputs | {"output_dir": "o", "max_steps": 30} | shares))
    assert check(args, given).total_steps == 30
    assert (args.eval_steps, args.save_steps, args.logging_steps) == (3, 15, 1)
