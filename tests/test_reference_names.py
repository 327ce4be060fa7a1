"""The options of the published reference code, understood by train.py: docs/coming-from-the-reference.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from hdpissa.engine.errors import ConfigError
from hdpissa.launch import reference_names, train_arguments

REQUIRED = {"ds_config": "zero3", "model_path": "M", "data_path": "D", "output_path": "O"}
PAGE = Path(__file__).resolve().parents[1] / "docs" / "coming-from-the-reference.md"


def translated(processes: int | None = 8, **theirs: str) -> tuple[dict[str, str], list[str]]:
    words, notes = reference_names.translate([w for n, v in theirs.items() for w in (f"--{n}", v)], processes)
    return {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}, notes


def test_other_names_for_the_same():
    values, notes = translated(
        model_path="M", output_path="O", data_path="D", data_split="train[:9]", ranks_per_gpu="16", batch_size="2",
        num_epochs="3", lr="2e-5",
    )  # fmt: skip
    assert values == {
        "model_name_or_path": "M", "output_dir": "O", "dataset_name": "D", "dataset_split": "train[:9]", "r": "16",
        "per_device_train_batch_size": "2", "num_train_epochs": "3", "learning_rate": "2e-5",
    }  # fmt: skip
    assert notes == []


def test_what_is_converted():
    values, notes = translated(accumulation_steps="64", dataset_field="query response", schedule="linear")
    assert values == {
        "gradient_accumulation_steps": "8", "prompt_field": "query", "response_field": "response",
        "lr_scheduler_type": "linear",
    }  # fmt: skip
    assert notes == ["--accumulation_steps 64 over 8 processes: --gradient_accumulation_steps 8"]
    values, notes = translated(alpha="16", ranks_per_gpu="16", dropout="0.0", world_size="8")
    assert values == {"r": "16"}
    assert notes == ["--alpha 16 changes nothing, as in the reference, where Adam cancels it; see --lora_alpha"]


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (
            {"accumulation_steps": "60"},
            ("with 8 processes", "must be a multiple of 8", "--gradient_accumulation_steps"),
        ),
        ({"accumulation_steps": "0"}, ("--accumulation_steps is 0", "at least 1")),
        ({"world_size": "4"}, ("--world_size is 4, but the launcher has started 8", "--num_accelerators 4")),
        ({"world_size": "many"}, ("--world_size is many", "whole number")),
        ({"dataset_field": "query"}, ('is "query"', "two columns")),
        ({"schedule": "constant"}, ("--schedule is constant", "cosine, linear", "--lr_scheduler_type")),
        ({"dropout": "0.05"}, ("--dropout is 0.05", "must be 0", "leave it out")),
        ({"alpha": "0"}, ("--alpha is 0", "trains nothing")),
        ({"alpha": "8", "ranks_per_gpu": "16"}, ("--alpha is 8 with r = 16", "trains nothing")),
        ({"lr": "1e-5", "learning_rate": "2e-5"}, ("--lr and --learning_rate mean the same", "keep one")),
    ],
)
def test_what_cannot_be_meant(theirs, words):
    with pytest.raises(ConfigError) as refused:
        translated(**theirs)
    assert all(word in str(refused.value) for word in words)


def test_both_spellings_and_a_value_that_is_missing():
    assert reference_names.translate(["--lr=1", "--seed", "2"], 1)[0] == ["--seed", "2", "--learning_rate", "1"]
    with pytest.raises(ConfigError, match="--lr has no value"):
        reference_names.translate(["--lr"], 1)


def test_train_py_takes_them_and_says_what_differs(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "h", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    words = [word for name, value in REQUIRED.items() for word in (f"--{name}", value)]
    args, given = train_arguments.parse([*words, "--accumulation_steps", "64", "--lr", "1e-4", "--batch_size", "2"])
    assert (args.model_name_or_path, args.dataset_name, args.output_dir) == ("M", "D", "O")
    assert (args.gradient_accumulation_steps, args.learning_rate, args.per_device_train_batch_size) == (16, 1e-4, 2)
    assert {"gradient_accumulation_steps", "learning_rate"} <= given
    assert capsys.readouterr().err.startswith("note: --accumulation_steps 64 over 4 processes")
    monkeypatch.setenv("RANK", "1")
    train_arguments.parse([*words, "--accumulation_steps", "64"])
    assert capsys.readouterr().err == ""
    with pytest.raises(ConfigError, match="--world_size is 8, but the launcher has started 4"):
        train_arguments.parse([*words, "--world_size", "8"])


def test_in_a_yaml_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**REQUIRED, "accumulation_steps": 3, "lr": "2e-5", "dataset_field": "q a"}))
    args, given = train_arguments.parse(["--config", str(file)])
    assert (args.gradient_accumulation_steps, args.learning_rate) == (3, 2e-5)
    assert (args.prompt_field, args.response_field, args.dataset_name) == ("q", "a", "D")
    assert {"learning_rate", "prompt_field"} <= given
    file.write_text(yaml.safe_dump({**REQUIRED, "lr": 1, "learning_rate": 2}))
    with pytest.raises(ConfigError, match="--lr and --learning_rate mean the same"):
        train_arguments.parse(["--config", str(file)])


def test_target_modules_are_one_text_there(tmp_path):
    """Quoted, with spaces; ours are several words."""
    words = [word for name, value in REQUIRED.items() for word in (f"--{name}", value)]
    wanted = train_arguments.parse([*words, "--target_modules", "q_proj", "v_proj", "--r", "4"])[0]
    assert train_arguments.parse([*words, "--target_modules", "q_proj v_proj", "--ranks_per_gpu", "4"])[0] == wanted
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**REQUIRED, "target_modules": "q_proj v_proj", "ranks_per_gpu": 4}))
    assert train_arguments.parse([str(file)])[0] == wanted


def test_every_name_is_on_the_page():
    page = PAGE.read_text()
    assert [name for name in reference_names.NAMES if f"`--{name}" not in page] == []
    rows = re.findall(r"^\| `--(\w+)`[^|]* \| `--(\w+)`", page, re.MULTILINE)
    assert [pair for pair in rows if pair[0] in reference_names.SAME and reference_names.SAME[pair[0]] != pair[1]] == []
    assert len(rows) >= 10
