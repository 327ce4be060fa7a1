"""Reads the rows of a run by `datasets`, and encodes instruction columns as TRL's trainers take them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import trl

from hdpissa.engine.errors import ConfigError
from hdpissa.launch.common.hub import check_path, explain, reason
from hdpissa.launch.common.prompts import PromptTemplate, resolve_template
from hdpissa.launch.training.alpaca import AlpacaEncoder
from hdpissa.launch.training.script_arguments import Arguments

FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
OF_TRL = ("messages", "conversations", "prompt", "input_ids")  # SFTTrainer reads these, and dataset_text_field
# Sets of columns of which a trainer takes any.
NEEDED = {
    "sft": (("messages",), ("conversations",), ("prompt", "completion"), ("input_ids",)),
    "dpo": (("chosen", "rejected"),),
    "reward": (("chosen", "rejected"),),
    "kto": (("completion", "label"), ("chosen", "rejected")),
    "grpo": (("prompt",),),
}


@dataclass(frozen=True)
class Rows:
    """The training and evaluation rows of a run.

    Attributes:
        template: of instruction rows; None for others. chat: whether rows are conversations.
    """

    train: Any
    held_out: Any
    template: PromptTemplate | None
    chat: bool


def read_rows(arguments: Arguments, tokenizer: Any) -> Rows:
    """Reads and maps; raises ConfigError for what is not there, or not usable."""
    script, mixture = arguments.script, arguments.mixture
    streaming = mixture.streaming or script.dataset_streaming
    if mixture.datasets:
        if script.dataset_name:
            raise ConfigError(f"--dataset_name {script.dataset_name} with datasets: in the YAML; keep one of them")
        found = _tried("datasets", lambda: trl.get_dataset(mixture))
        train, held_out = found["train"], found.get("test")
    elif script.dataset_name:
        train, held_out = load(arguments, script.dataset_name, script.dataset_train_split, streaming), None
    else:
        raise ConfigError("missing --dataset_name, or datasets: in the YAML of --config; see --help")
    if script.eval_dataset_name or script.dataset_test_split:
        name = script.eval_dataset_name or script.dataset_name
        held_out = load(arguments, str(name), script.dataset_test_split or "train", streaming=False)
    template, chat = _kind_of(train, arguments)
    train, held_out = (rows and _mapped(rows, arguments, tokenizer, template) for rows in (train, held_out))
    if template is None:
        for rows in filter(None, (train, held_out)):
            _refuse_columns(rows, arguments)
    return Rows(train, held_out, template, chat)


def load(arguments: Arguments, name: str, split: str, streaming: bool) -> Any:
    """A dataset by the name of a file, a folder, or on the hub; `split` in the syntax of `datasets`."""
    check_path("--dataset_name", name)
    script, path = arguments.script, Path(name).expanduser()
    more: dict[str, Any] = {"split": split, "streaming": streaming}
    if path.suffix in FILES:
        more |= {"data_files": {"train": str(path)}, **({"sep": "\t"} if path.suffix == ".tsv" else {})}
        return _tried(name, lambda: datasets.load_dataset(FILES[path.suffix], **more), path)
    if (path / "state.json").exists():  # of `save_to_disk`
        return _tried(name, lambda: datasets.load_dataset("arrow", data_files={"train": f"{path}/*.arrow"}, **more))
    if (path / "dataset_dict.json").exists():
        files = {part.name: f"{part}/*.arrow" for part in path.iterdir() if part.is_dir()}
        return _tried(name, lambda: datasets.load_dataset("arrow", data_files=files, **more))
    more |= {"name": script.dataset_config, "revision": script.dataset_revision}
    return _tried(name, lambda: datasets.load_dataset(str(path) if path.exists() else name, **more))


def _tried(name: str, read: Any, file: Path | None = None) -> Any:
    try:
        return read()
    except Exception as error:  # damaged files and the hub raise errors of many types
        problem, remedy = explain(error) or (reason(error.__cause__ or error), "give a file, a folder or a hub name")
        if file is not None and file.suffix == ".jsonl" and file.is_file() and (line := _damaged_line(file)):
            problem, remedy = f"line {line} is not a JSON object", "fix that line"
        raise ConfigError(f"dataset {name}: cannot be read ({problem}); {remedy}") from error


def _damaged_line(file: Path) -> int | None:
    """The first line, from 1, that is not a JSON object; the reader of `datasets` counts within its own blocks."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return number
            except json.JSONDecodeError:
                return number
    return None


def _columns(rows: Any) -> list[str]:
    return list(rows.column_names or next(iter(rows)))


def _kind_of(rows: Any, arguments: Arguments) -> tuple[PromptTemplate | None, bool]:
    """(template of instructions, if the rows are such; whether they are conversations)."""
    first = next(iter(rows), None)
    if first is None:
        raise ConfigError(f"dataset {arguments.script.dataset_name}: has no rows; give one that has some")
    if arguments.kind == "sft" and instruction_columns(rows, arguments):
        return resolve_template(arguments.script.prompt_template), False
    return None, trl.is_conversational(trl.maybe_convert_to_chatml(dict(first)))


def instruction_columns(rows: Any, arguments: Arguments) -> dict[str, str]:
    """The encoder's columns, by name; none where TRL reads the rows itself."""
    script, columns = arguments.script, _columns(rows)
    prompt = script.prompt_field or "instruction"
    response = script.response_field or ("response" if "response" in columns else "output")
    given = bool(script.prompt_field or script.response_field)
    if {prompt, response} <= set(columns):
        return {"prompt": prompt, "response": response} | (
            {} if given or "input" not in columns else {"input": "input"}
        )
    if given or not {*OF_TRL, _text_column(arguments)} & set(columns):
        missing = prompt if prompt not in columns else script.response_field or "response"
        raise ConfigError(
            f"column {missing!r} is not in the dataset, whose columns are {', '.join(columns)}; set --prompt_field and "
            f"--response_field to two of them, or rename columns to what TRL takes"
        )
    return {}


def _text_column(arguments: Arguments) -> str:
    """The column of plain text, which SFTConfig names."""
    training = arguments.training
    return training.dataset_text_field if isinstance(training, trl.SFTConfig) else "text"


def _refuse_columns(rows: Any, arguments: Arguments) -> None:
    """Raises ConfigError for columns that TRL's trainer cannot read."""
    columns, kind = _columns(rows), arguments.kind
    texts = ((_text_column(arguments),),) if kind == "sft" else ()
    choices = (*NEEDED[kind], *texts)
    if not any(set(choice) <= set(columns) for choice in choices):
        wanted = "; or ".join(" and ".join(choice) for choice in choices)
        raise ConfigError(
            f"--trainer {kind} takes rows with the columns {wanted}; the dataset has {', '.join(columns)}: rename "
            f"them, or name two with --prompt_field and --response_field"
        )


def _mapped(rows: Any, arguments: Arguments, tokenizer: Any, template: PromptTemplate | None) -> Any:
    script = arguments.script
    if template is None:  # TRL's names for the columns, where the user gives others
        named = {script.prompt_field: "prompt", script.response_field: "completion"}
        return rows.rename_columns({old: new for old, new in named.items() if old and old != new})
    encoder = AlpacaEncoder(
        tokenizer,
        template,
        learn_prompt=getattr(arguments.training, "completion_only_loss", None) is False,
        **instruction_columns(rows, arguments),
    )
    with arguments.training.main_process_first(desc="tokenising"):
        return rows.map(encoder, batched=True, remove_columns=_columns(rows))
