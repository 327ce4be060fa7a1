"""The task that methods are compared on: rows of a file or the arithmetic generator, one order for all methods.

Reading, masking and order are the training script's own. The order is that of the largest number of slices in the
comparison; a method without slices takes the same micro-batches one after another.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import trl
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

from hdpissa.engine.errors import ConfigError
from hdpissa.engine.sharding.slicing import SlicePlan
from hdpissa.launch import demo_data
from hdpissa.launch.command_line import make_parser, option, read
from hdpissa.launch.demo_model import DemoModelError, ensure_demo_model
from hdpissa.launch.trainers.sampler import SliceOrder, SliceSampler
from hdpissa.launch.training import checks as run_checks
from hdpissa.launch.training import rows as train_rows
from hdpissa.launch.training.alpaca import IGNORE, AlpacaEncoder
from hdpissa.launch.training.prompts import resolve_template
from hdpissa.launch.training.script_arguments import Arguments, ScriptArguments


@dataclass
class TaskArguments:
    """What the scripts' command lines have in common; names as in launch/train.py."""

    model_name_or_path: str = option("", "Hugging Face folder or hub name; default SmolLM2-135M", aliases=["--model"])
    dataset_name: str | None = option(
        None, "jsonl, json, csv or parquet file, folder or hub name; default: arithmetic word problems, generated here"
    )
    dataset_split: str = option("train", "split of it")
    prompt_field: str = option("instruction", "column with the prompt")
    response_field: str = option("response", "column with the answer; its result stands after ####, as in GSM8K")
    prompt_template: str = option("alpaca", "'alpaca', 'none', a file, or a text with {instruction}")
    max_length: int = option(256, "tokens of prompt and answer together; longer rows are cut")
    train_rows: int = option(1024, "rows to train on at most, the first ones; 0: all of a file")
    micro_batch: int = option(1, "rows of a micro-batch")
    accumulation: int = option(8, "micro-batches of an optimizer step, for every method")


def parse(arguments: type, argv: list[str] | None = None) -> Any:
    """The dataclass filled from a command line, the model's folder in its place; ConfigError for bad input.

    Returns:
        The dataclass; its attribute `given` has the names of what stands on the command line.
    """
    values, given = read(make_parser(arguments), sys.argv[1:] if argv is None else argv)
    args = arguments(**values)
    args.given = frozenset(given)
    for name in ("max_length", "micro_batch", "accumulation"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}: must be at least 1; raise it")
    if args.train_rows < 0 or (args.train_rows == 0 and args.dataset_name is None):
        raise ConfigError(f"--train_rows is {args.train_rows}: must be at least 1, or 0 for all of a file; raise it")
    if not args.model_name_or_path and not getattr(args, "report", False):  # which reads no model
        try:
            args.model_name_or_path = ensure_demo_model()
        except DemoModelError as error:
            raise ConfigError(f"--model is missing, and the demo model cannot be had: {error}") from None
    return args


def run(main: Callable[[], int]) -> int:
    """`main` with a user's mistakes as one line and exit code 2."""
    try:
        return main()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def refuse_slices(slices: list[int], accumulation: int) -> None:
    """Refuses what cannot be worked off in one process."""
    for number in slices:
        if number < 1 or accumulation % number:
            raise ConfigError(
                f"--slices {number} with --accumulation {accumulation}: each slice needs its own micro-batches, so the "
                f"latter must be a multiple of the former; change one"
            )
        if max(slices) % number:
            raise ConfigError(f"--slices {number} does not divide {max(slices)}, the largest; give powers of two")


@dataclass(frozen=True)
class Task:
    """Rows to train on, `input_ids` and `labels`."""

    train: datasets.Dataset
    tokenizer: Any

    def micro_batches(self, args: TaskArguments, *, slices: int, seed: int) -> DataLoader:
        """Those of an epoch of one run: `accumulation` of a step, in it the first slice's before the second's."""
        order = SliceOrder(SlicePlan(slices, world_size=1, rank=0), args.accumulation, args.micro_batch)
        sampler = SliceSampler(len(self.train), order, seed)
        self.tokenizer.padding_side = "right"
        pad = DataCollatorForSeq2Seq(self.tokenizer)
        return DataLoader(self.train, args.micro_batch, sampler=sampler, collate_fn=pad)  # type: ignore[arg-type]


def make_task(args: TaskArguments) -> Task:
    """Reads and tokenises.

    Raises:
        ConfigError: no such model, file or column, or too few rows.
    """
    datasets.disable_progress_bars()
    template = resolve_template(args.prompt_template)
    tokenizer = run_checks.read_tokenizer(args.model_name_or_path, "main", trust_remote_code=False)
    if args.dataset_name is None:
        args.prompt_field, args.response_field = "instruction", "response"
        rows = generated(args.train_rows)
    else:
        rows = load(args.dataset_name, args.dataset_split)
        rows = rows.select(range(min(len(rows), args.train_rows or len(rows))))
    fields = (args.prompt_field, args.response_field)
    for field in fields:
        if field not in rows.column_names:
            raise ConfigError(f"column {field!r} is not in the dataset; its columns are {', '.join(rows.column_names)}")
    return Task(encode(rows, AlpacaEncoder(tokenizer, template, *fields), args.max_length), tokenizer)


def generated(rows: int) -> datasets.Dataset:
    """Arithmetic word problems; ConfigError where there are not so many."""
    try:
        return datasets.Dataset.from_list(demo_data.generate(rows, seed=0))
    except ValueError as error:
        raise ConfigError(f"--train_rows {rows}: {error}") from None


def load(name: str, split: str) -> datasets.Dataset:
    """A dataset by the name of a file, a folder, or on the hub."""
    script = Arguments(ScriptArguments(), None, trl.DatasetMixtureConfig(), frozenset())
    return train_rows.load(script, name, split, streaming=False)


def encode(rows: datasets.Dataset, encoder: AlpacaEncoder, max_length: int) -> datasets.Dataset:
    """Rows as the model sees them, cut at `max_length`; without those whose answer lies behind it.

    Raises:
        ConfigError: no row is left.
    """

    def cut(batch: Mapping[str, list]) -> dict[str, list]:
        found = encoder(batch)
        kept = [any(label != IGNORE for label in row[1:max_length]) for row in found["labels"]]  # 0 is not predicted
        return {name: [row[:max_length] for row in itertools.compress(rows, kept)] for name, rows in found.items()}

    encoded = rows.map(cut, batched=True, remove_columns=rows.column_names)
    if not len(encoded):
        raise ConfigError(f"--max_length {max_length} leaves no answer token in any row; raise it")
    return encoded
