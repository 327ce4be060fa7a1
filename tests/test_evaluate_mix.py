"""launch/evaluate.py of a run whose training data is a mix of sets, each with options of its own."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import datasets
import pytest
from launch_runs import flags, make_inputs
from transformers import AutoTokenizer

from hdpissa.engine import ConfigError
from hdpissa.engine.data import IGNORE
from hdpissa.launch import evaluate, evaluate_dataset, train_arguments
from hdpissa.launch.train_data import read_rows

COUNT = 6


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, and sets of the same sentences in other columns."""
    folder = tmp_path_factory.mktemp("mix")
    made = make_inputs(folder)
    rows = [json.loads(line) for line in Path(made["eval_dataset_name"]).read_text().splitlines()][:COUNT]
    pairs = [(row["instruction"], row["response"]) for row in rows]
    shapes = {
        "math": [{"query": q, "answer": a, "text": a} for q, a in pairs],
        "code": [{"instruction": q, "output": f"{a} {a}", "text": a} for q, a in pairs],
        "plain": [{"text": a} for _, a in pairs],
        "test": [{"instruction": q, "response": a} for q, a in pairs[:4]],
        "more": [{"query": q, "answer": a} for q, a in pairs[:3]],
    }
    for name, content in shapes.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return {name: str(folder / f"{name}.jsonl") for name in shapes} | {"model": made["model_name_or_path"]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


MIX = {"prompt_field": "query - -", "response_field": "answer output -", "dataset_format": "- - text", "seed": 7}


def trained(files, folder: Path, **options):
    """(the folder of a run with this data, what the run itself read), as train.py's own command line has it."""
    sets = f"{files['math']}:4 {files['code']} {files['plain']}:0.5"
    required = {"ds_config": "zero3", "model_name_or_path": files["model"], "output_dir": str(folder)}
    said = required | {"dataset_name": sets} | MIX | options
    args, given = train_arguments.parse(flags({name: value for name, value in said.items() if value is not None}))
    (folder / "model").symlink_to(files["model"])
    (folder / "run.json").write_text(json.dumps({"arguments": asdict(args)}))
    return read_rows(args, given, AutoTokenizer.from_pretrained(files["model"]))


def evaluated(files, folder: Path, *words: str, chat_template: str | None = None):
    """The rows that evaluate.py reads for such a run, whose export has that template."""
    args, found, request = evaluate.parse(["--model", str(folder), *words])
    tokenizer = AutoTokenizer.from_pretrained(files["model"])
    tokenizer.chat_template = chat_template
    return evaluate_dataset.read(args, request, tokenizer, seed=found.run["seed"]).train.dataset


def same(found, wanted) -> bool:
    columns = "input_ids", "labels"
    return all([list(row) for row in found[c]] == [list(row) for row in wanted[c]] for c in columns)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"eval_split": "train[:2]"}, 6),  # of each set
        ({"eval_split": "train[:2] train[:1] -"}, 9),
        ({"eval_dataset_name": "math"}, 6),  # which has the columns of the training set of this name
        ({"eval_dataset_name": "code:2 plain:0.5"}, 5),
        ({"eval_dataset_name": "test"}, 4),  # what all sets have in common: nothing, so its columns say it
        ({"eval_dataset_name": "math:1 test"}, 5),
        ({"eval_dataset_name": "more", "eval_prompt_field": "query", "eval_response_field": "answer"}, 3),
        (
            {
                "eval_dataset_name": "more code",
                "eval_prompt_field": "query -",
                "eval_response_field": "answer -",
                "eval_dataset_format": "- alpaca",
            },
            9,
        ),
    ],
    ids=str,
)
def test_the_runs_own_evaluation_rows(files, tmp_path, options, rows):
    """From run.json alone, the very rows that the run evaluated on."""
    if "eval_dataset_name" in options:
        words = [word.partition(":") for word in options["eval_dataset_name"].split()]
        options = options | {"eval_dataset_name": " ".join(f"{files[name]}{colon}{n}" for name, colon, n in words)}
    held_out = trained(files, tmp_path, **options).held_out.dataset
    assert len(held_out) == rows
    assert same(evaluated(files, tmp_path), held_out)


def test_a_set_that_was_trained_on_twice_is_evaluated_once(files, tmp_path):
    twice = {"dataset_name": f"{files['more']} {files['more']}", "dataset_format": "-", "prompt_field": "query"}
    run = trained(files, tmp_path, **twice, response_field="answer", eval_split="train[:2]")
    assert (len(run.train.dataset), len(run.held_out.dataset)) == (6, 2)
    assert same(evaluated(files, tmp_path), run.held_out.dataset)


def test_with_the_arguments_of_the_training_set(files, tmp_path):
    """What stood on train.py's command line reads the same rows here; of the sets by name the run knows the columns."""
    train = trained(files, tmp_path).train.dataset
    sets = f"{files['math']}:4 {files['code']} {files['plain']}:0.5"
    options = {name: value for name, value in MIX.items() if name != "seed"}
    assert same(evaluated(files, tmp_path, "--dataset_name", sets, *flags(options)), train)
    assert same(evaluated(files, tmp_path, "--dataset_name", sets), train)


def test_another_set_of_such_a_run(files, tmp_path):
    """Columns that only one set had are nobody else's, and the command line has the last word."""
    trained(files, tmp_path)
    assert len(evaluated(files, tmp_path, "--dataset_name", files["test"])) == 4
    words = ["--prompt_field", "query -", "--response_field", "answer -"]
    found = evaluated(files, tmp_path, "--dataset_name", f"{files['more']} {files['test']}", *words)
    assert len(found) == 7
    assert same(found.select(range(3)), found.select(range(3, 6))), "the same sentences under other names"


def test_another_set_has_the_format_and_the_columns_that_all_had(tmp_path, files):
    """Of a run on texts a set that has Alpaca's columns, too, is read as texts."""
    for name in ("train", "test"):
        rows = [{"instruction": f"{name} {n}", "output": "o", "content": f"{name} text {n}"} for n in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = {"prompt_field": "instruction", "response_field": "response", "dataset_text_field": "content"}
    one |= {"dataset_name": str(tmp_path / "train.jsonl"), "dataset_format": "text", "dataset_split": "train[:3]"}
    trained(files, tmp_path, **one)
    tokenizer = AutoTokenizer.from_pretrained(files["model"])
    for name, count in (("train", 4), ("test", 4)):  # a part of the training set is not what was asked for
        found = evaluated(files, tmp_path, "--dataset_name", str(tmp_path / f"{name}.jsonl"))
        assert [tokenizer.decode(ids) for ids in found["input_ids"]] == [f"{name} text {n}<eos>" for n in range(count)]
    both = f"{tmp_path / 'train.jsonl'}:1 {tmp_path / 'test.jsonl'}:1"
    assert len(evaluated(files, tmp_path, "--dataset_name", both)) == 2


def test_a_named_evaluation_set_keeps_its_columns(files, tmp_path):
    """By name on the command line; and a training set beside it keeps its own."""
    options = {"eval_dataset_name": files["more"], "eval_prompt_field": "query", "eval_response_field": "answer"}
    plain = {"dataset_name": files["test"], "dataset_format": "-", "prompt_field": "instruction"}
    run = trained(files, tmp_path, **options, **plain, response_field="response")
    both = evaluated(files, tmp_path, "--dataset_name", f"{files['more']} {files['test']}")
    assert same(both.select(range(3)), run.held_out.dataset)
    assert same(both.select(range(3, 7)), run.train.dataset)


def test_it_evaluates(files, tmp_path, capsys):
    """The command itself, model and all."""
    held_out = trained(files, tmp_path, eval_split="train[:2]").held_out.dataset
    evaluate.main(["--model", str(tmp_path), "--device", "cpu"])
    model, *sets, how, figures = capsys.readouterr().out.splitlines()
    assert model == f"model: {tmp_path}/model"
    assert how == "computes in float32 on cpu"
    formats = [f"evaluation data {files['math']}: alpaca (columns query, answer)"]
    formats += [f"evaluation data {files['code']}: alpaca (columns instruction, output)"]
    formats += [f"evaluation data {files['plain']}: text (column text)"]
    assert [line.partition(";")[0] for line in sets] == formats
    told = figures.split()
    tokens = sum(label != IGNORE for labels in held_out["labels"] for label in labels[1:])
    assert float(told[told.index("tokens") + 1]) == tokens


def test_what_the_run_said_of_other_rows_is_no_mistake_here(files, tmp_path):
    """The run's prompt template is for its Alpaca rows; what stands on the command line has to be read by something."""
    trained(files, tmp_path, prompt_template="none")
    words = ("--dataset_name", files["plain"])
    assert len(evaluated(files, tmp_path, *words)) == COUNT
    with pytest.raises(ConfigError, match="--prompt_template 'none' is for alpaca rows, and there are none"):
        evaluated(files, tmp_path, *words, "--prompt_template", "none")


def test_what_the_run_said_of_turns_is_not_asked_of_rows_without(files, tmp_path):
    """Though --assistant_only_loss was the run's own; on the command line it is refused. So is a file that is gone."""
    jinja, chats = tmp_path / "gone.jinja", tmp_path / "chats.jsonl"
    jinja.write_text(text := "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    chats.write_text(json.dumps({"messages": turns}))
    none = {"prompt_field": None, "response_field": None, "dataset_format": None}
    own = {"dataset_name": str(chats), "assistant_only_loss": "true", "chat_template": str(jinja)}
    trained(files, tmp_path, **none, **own)
    jinja.unlink()
    words = ["--dataset_name", files["plain"]]
    assert len(evaluated(files, tmp_path, *words, chat_template=text)) == COUNT
    with pytest.raises(ConfigError, match=r"--assistant_only_loss: rows of text .* have no turns"):
        evaluated(files, tmp_path, *words, "--assistant_only_loss", "true", chat_template=text)
