"""Where rows come from: files, folders, folders saved by `datasets`, the hub; one set or a mix of several.

Own file because it knows nothing of columns, prompts and tokens; those are data_formats.py and data.py.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from .data_files import ask_for_file, ask_for_folder, check_kind, is_file_name
from .errors import ConfigError
from .hub_errors import explain

SAVED = ("dataset_dict.json", "state.json")  # one of these is what `save_to_disk` leaves
AMOUNT = re.compile(r"(?P<name>.+):(?:(?P<rows>\d+)|(?P<share>\d*\.\d+|\d+\.\d*))$")


@dataclass(frozen=True)
class Source:
    """One set of a mix: its name or path, and how much of it: rows (int), a share (float), or all of it (None)."""

    name: str
    amount: int | float | None = None

    def __str__(self) -> str:
        return self.name if self.amount is None else f"{self.name}:{self.amount}"


def parse_sources(text: str, option: str = "--dataset_name") -> list[Source]:
    """The sets that an option names: "a.jsonl", "a.jsonl b.jsonl", "metamath:100000 python:0.5".

    A path that exists is one set, whatever characters it has. Raises ConfigError for an amount of nothing, or no name.
    """
    if not text.split():
        raise ConfigError(f"{option} is {text!r}: must name a dataset; give one, or leave it out")
    if _exists(text):
        return [Source(text)]
    return [_parse_source(word, option) for word in text.split()]


def _exists(text: str) -> bool:
    """Whether there is such a path; of a text that can be none, too long or of a user who is not there, False."""
    return os.path.exists(os.path.expanduser(text))


def is_same(name: str, other: str) -> bool:
    """Whether two names are of one dataset: of one path, where they are paths."""
    return name == other or (_exists(name) and _exists(other) and _real(name) == _real(other))


def _real(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))


def _parse_source(word: str, option: str) -> Source:
    found = AMOUNT.match(word)
    if found is None or _exists(word):
        return Source(word)
    amount = int(found["rows"]) if found["rows"] else float(found["share"])
    if amount == 0 or (isinstance(amount, float) and amount > 1):
        raise ConfigError(
            f"{option}: {word} asks for {amount} of a dataset; give a number of rows (:1000), or a share with a point "
            f"(:0.5) above 0 and up to 1.0; name a dataset twice to have its rows twice"
        )
    return Source(found["name"], amount)


def spread(value: str | None, count: int, option: str, *, blanks: bool = True) -> list[str | None]:
    """An option's value for each of `count` sets: one value for all of them, or one each with "-" for none.

    Args:
        blanks: a value may have blanks in it, so that for a single set the text is one value.
    """
    if value is None:
        return [None] * count
    words = [value] if blanks and count == 1 else value.split()
    if len(words) == 1:
        words *= count
    if len(words) != count:
        sets = "1 dataset" if count == 1 else f"{count} datasets"
        raise ConfigError(
            f"{option} is {value!r}: {len(words)} values for {sets}; give one for all, or one for each (- for none)"
        )
    return [None if word == "-" else word for word in words]


# ---------------------------------------------------------------- reading


def load_rows(
    name_or_path: str,
    *,
    split: str = "train",
    config_name: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> Any:
    """One split of a file (data_files.py), a folder of these or saved by `datasets`, or a hub dataset.

    A single file is the split "train"; `split` may be a part, as in "train[:80]".
    With `streaming` the rows come one by one (an IterableDataset), and nothing is kept on disk.
    Raises ConfigError for a missing or unreadable source, an unknown split, no rows.
    """
    quiet_other_local_ranks()
    where = f"dataset {name_or_path!r}, split {split!r},"
    try:
        rows = _load(Path(os.path.expanduser(name_or_path)), name_or_path, split, config_name, revision, streaming)
    # ValueError: unknown split or config; OSError: not found, offline; RuntimeError: the hub
    # client; StopIteration: the JSON reader, of a file without a line in it.
    except (datasets.exceptions.DatasetsError, ValueError, OSError, RuntimeError, StopIteration) as error:
        if isinstance(error, ConfigError):
            raise
        known = None if _exists(name_or_path) else explain(error)
        said, remedy = known or (_reason(error), "check its name, split and format")
        raise ConfigError(f"{where} cannot be read ({said}); {remedy}") from error
    if not streaming and len(rows) == 0:
        raise ConfigError(f"{where} has no rows; give one that has some")
    return rows


def check_there(name: str) -> None:
    """Refuses what can only be a path and is not there, and a file of no known kind; reads nothing."""
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        check_kind(Path(path))
    elif not os.path.isdir(path) and _looks_like_path(name):
        raise ConfigError(f"dataset {name!r}: no such file or folder; check the path")


def _load(path: Path, name: str, split: str, config_name: str | None, revision: str | None, streaming: bool) -> Any:
    arguments: dict[str, Any] = {"split": split, "streaming": streaming}
    if path.is_file():
        arguments |= ask_for_file(path)
    elif path.is_dir() and any((path / file).is_file() for file in SAVED):
        rows = _load_saved(path, split)
        return rows.to_iterable_dataset() if streaming else rows
    elif path.is_dir():
        arguments |= ask_for_folder(path, split, config_name)
    else:
        check_there(name)
        arguments |= {"path": name, "name": config_name, "revision": revision}
    return datasets.load_dataset(**arguments)


def _load_saved(path: Path, split: str) -> datasets.Dataset:
    """A part of what `save_to_disk` wrote; a set that was saved without splits is "train"."""
    saved = datasets.load_from_disk(str(path))
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    rows = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return rows[0] if len(rows) == 1 else datasets.concatenate_datasets(rows)


def take(rows: datasets.Dataset, source: Source, seed: int, option: str = "--dataset_name") -> datasets.Dataset:
    """As many rows as the source says, drawn by the seed; all of them, in their order, where it says nothing.

    Args:
        option: that names the source.
    """
    if source.amount is None:
        return rows
    count = source.amount if isinstance(source.amount, int) else max(1, round(source.amount * len(rows)))
    if count > len(rows):
        raise ConfigError(
            f"{option}: {source} asks for {count} rows and {source.name} has {len(rows)}; ask for no more, or "
            f"name it twice to have its rows twice"
        )
    return rows.shuffle(seed=seed, keep_in_memory=True).select(range(count), keep_in_memory=True)


def mix_streams(streams: Sequence[Any], sources: Sequence[Source], seed: int) -> Any:
    """One stream of several: which of them gives the next row is drawn by the seed, until all of them are empty.

    They are drawn in proportion to the rows that are asked of them, equally where all of them are given whole.
    """
    amounts = [source.amount for source in sources]
    if any(isinstance(amount, float) for amount in amounts):
        raise ConfigError(
            f"--dataset_name {' '.join(map(str, sources))} with --streaming: nobody knows what a share of a stream is; "
            f"give numbers of rows (:1000)"
        )
    if any(amounts) and not all(amounts):
        raise ConfigError(
            f"--dataset_name {' '.join(map(str, sources))} with --streaming: give a number of rows for each, or for "
            f"none"
        )
    limited = [s if n is None else s.take(n) for s, n in zip(streams, amounts, strict=True)]
    if len(limited) == 1:
        return limited[0]
    weights = [amount or 1 for amount in amounts]
    return datasets.interleave_datasets(
        limited,
        probabilities=[weight / sum(weights) for weight in weights],
        seed=seed,
        stopping_strategy="all_exhausted_without_replacement",
    )


def _looks_like_path(name: str) -> bool:
    """A hub name is "name" or "org/name"; everything else can only have meant a file."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or is_file_name(name)


def _reason(error: Exception) -> str:
    """What went wrong, in a line; the generic wrapper of `datasets` hides it in its cause."""
    inner = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
    if isinstance(error, StopIteration):
        return "it is empty"
    if isinstance(inner, datasets.table.CastError):
        return f"not all of its files or rows have the same columns: {inner.details().rstrip('.')}"
    lines = str(inner or error).strip().splitlines()
    if lines and lines[0].startswith("Couldn't cast"):  # what to what stands in the lines below
        lines = [textwrap.shorten(" ".join(lines), 300, placeholder=" …")]
    return lines[0].rstrip(".") if lines else type(error).__name__


def quiet_other_local_ranks() -> None:
    """One progress bar per node instead of one per process."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        datasets.disable_progress_bars()
