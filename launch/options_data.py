"""Options of train.py, "data": what the run learns from: sources, prompts, lengths."""

from __future__ import annotations

from dataclasses import dataclass

from hdpissa.launch.command_line import at_least, option


@dataclass
class DataOptions:
    """What the run learns from: sources, prompts, lengths."""

    dataset_name: str = option("", "jsonl, json, csv or parquet file, a folder of them, or a hub name")
    dataset_config: str | None = option(None, "configuration of a hub dataset")
    dataset_split: str = option("train", "split to train on; slices such as train[:80] work")
    eval_dataset_name: str | None = option(None, "dataset to evaluate on; default: --eval_split of --dataset_name")
    eval_split: str | None = option(None, "split to evaluate on (default 'train' of --eval_dataset_name)")
    prompt_field: str = option("instruction", "column with the prompt")
    response_field: str = option("response", "column with the answer")
    prompt_template: str = option("alpaca", "'alpaca', 'none', a file, or a text with {instruction}")
    max_length: int = option(512, "tokens of prompt and answer together; longer rows are cut")
    preprocessing_num_workers: int | None = option(None, "processes that tokenise")


def check(args: DataOptions) -> None:
    """Raises ConfigError for values out of range."""
    at_least(args, 1, "max_length")
