"""Options of train.py, "data": what the run learns from: sources, formats, prompts, lengths, what carries loss."""

from __future__ import annotations

from dataclasses import dataclass

from hdpissa.engine.errors import ConfigError
from hdpissa.launch.command_line import at_least, at_most, one_of, option


@dataclass
class ReadingOptions:
    """Which rows are read, and what is made of them; also those of evaluate.py."""

    dataset_name: str = option(
        "",
        "jsonl, json, csv, tsv, parquet or arrow file, a folder of them or saved by `datasets`, or a hub name; several "
        "with numbers of rows or shares: 'a.jsonl:1000 b.jsonl:0.5'",
    )
    dataset_config: str | None = option(None, "configuration of a hub dataset")
    dataset_revision: str | None = option(None, "branch, tag or commit of a hub dataset")
    dataset_split: str = option("train", "split to train on; parts of it, such as train[:80], too")
    dataset_format: str | None = option(
        None, "alpaca, sharegpt, messages, prompt_completion or text; default: what the columns say"
    )
    prompt_field: str = option("instruction", "column with the prompt")
    response_field: str = option("response", "column with the answer")
    dataset_text_field: str = option("text", "column of plain text")
    prompt_template: str = option("alpaca", "'alpaca', 'none', a file, or a text with {instruction}")
    chat_template: str | None = option(
        None,
        "Jinja file or text for messages; default: the tokenizer's. 'tokenizer', or any, puts alpaca rows into it, too",
    )
    train_on_prompt: bool = option(False, "everything carries loss, prompts too")
    completion_only_loss: bool | None = option(None, "whether only answers carry loss (TRL's name); default: yes")
    assistant_only_loss: bool | None = option(
        None, "whether only the assistant's turns carry loss (TRL's name); default: yes for conversations"
    )
    max_length: int = option(512, "tokens of prompt and answer together")
    truncation: str = option("truncate", "of longer rows: truncate, drop, or error")
    preprocessing_num_workers: int | None = option(None, "processes that tokenise")


@dataclass
class DataOptions(ReadingOptions):
    """What the run learns from: sources, formats, prompts, lengths, what carries loss."""

    eval_dataset_name: str | None = option(None, "dataset to evaluate on; default: --eval_split of --dataset_name")
    eval_split: str | None = option(
        None, "split to evaluate on, or one for each set (default 'train' of --eval_dataset_name)"
    )
    eval_dataset_config: str | None = option(None, "--dataset_config of the evaluation set")
    eval_dataset_revision: str | None = option(None, "--dataset_revision of the evaluation set")
    eval_dataset_format: str | None = option(
        None, "--dataset_format of the evaluation set; default: the training set's"
    )
    eval_prompt_field: str | None = option(None, "--prompt_field of the evaluation set; default: the training set's")
    eval_response_field: str | None = option(
        None, "--response_field of the evaluation set; default: the training set's"
    )
    packing: bool = option(False, "put several rows into one of max_length tokens; none sees another")
    group_by_length: bool = option(False, "give the slices rows of about the same length at the same time")
    loss_normalization: str = option(
        "mean", "of a slice's step: mean of its micro-batches, as published; or tokens, where each weighs the same"
    )
    streaming: bool = option(False, "read rows when they are needed; wants --max_steps")
    shuffle_buffer_size: int = option(10_000, "rows from which a stream is shuffled")
    preview: int = option(0, "print this many training rows, with what carries loss marked, and train nothing")


FORMATS = ("alpaca", "sharegpt", "messages", "prompt_completion", "text")
EVAL = "eval_"  # before the name of what is said of evaluation sets; of the split, --eval_split
OF_EVALUATION = ("dataset_config", "dataset_revision", "dataset_format", "prompt_field", "response_field")
TRUNCATIONS, NORMALIZATIONS = ("truncate", "drop", "error"), ("mean", "tokens")


def check_reading(args: ReadingOptions) -> None:
    """Raises ConfigError for values out of range."""
    at_least(args, 1, "max_length", "preprocessing_num_workers")
    at_most(args, 2**31 - 1, "max_length", why="what a row's length is counted in")
    one_of(args, "truncation", TRUNCATIONS)
    _check_formats(args, "dataset_format")


def _check_formats(args: ReadingOptions, name: str) -> None:
    for format in (getattr(args, name) or "").split():  # one for each dataset of a mix
        if format not in (*FORMATS, "-"):
            raise ConfigError(f"--{name} is {format}: must be one of {', '.join(FORMATS)}")


def check(args: DataOptions) -> None:
    """Raises ConfigError for values out of range, and for options that exclude each other."""
    check_reading(args)
    _check_formats(args, "eval_dataset_format")
    unread = next((name for name in OF_EVALUATION if getattr(args, EVAL + name) is not None), None)
    if unread and not (args.eval_dataset_name or args.eval_split):
        raise ConfigError(f"--{EVAL}{unread} needs evaluation rows: give --eval_dataset_name or --eval_split")
    at_least(args, 1, "shuffle_buffer_size")
    at_least(args, 0, "preview")
    one_of(args, "loss_normalization", NORMALIZATIONS)
    if args.streaming and not getattr(args, "max_steps", 0) > 0:
        raise ConfigError("--streaming without --max_steps: a stream has no length; give the number of steps")
    for other in ("streaming", "packing"):
        if args.group_by_length and getattr(args, other):
            why = "nobody knows the lengths of a stream" if other == "streaming" else "packed rows are equally long"
            raise ConfigError(f"--group_by_length with --{other}: {why}; leave one out")
