"""From a file or a hub name to rows of token ids and labels.

Own file because it is all that happens to data *before* there is an order:
reading, wrapping in a prompt, tokenising, masking. Which row goes to which
slice is engine/batches.py. It never talks to torch.distributed: every process
calls it before the process group exists, and a file lock lets the first
process of a node do the work whose cached result the others read.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from filelock import FileLock

from .errors import ConfigError
from .prompts import PromptTemplate

IGNORE = -100  # torch's cross entropy skips this label
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
FORMAT_VERSION = 1  # part of the cache key: raise it whenever `_encode_batch` changes its result
FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        "truncated": datasets.Value("bool"),
    }
)


@dataclass(frozen=True)
class TokenizedRows:
    """`dataset` has `input_ids` and `labels` (lists of ints of equal length).

    `dropped_without_labels` rows left no answer token inside max_length and are
    not in `dataset`; of those that are, `truncated` lost the end of their answer.
    """

    dataset: datasets.Dataset
    dropped_without_labels: int
    truncated: int


# ---------------------------------------------------------------- reading


def load_rows(
    name_or_path: str, *, split: str = "train", config_name: str | None = None, revision: str | None = None
) -> datasets.Dataset:
    """One split of a .jsonl, .json, .csv or .parquet file, a folder of these, or a hub dataset.

    A single file is the split "train"; `split` may be a part, as in "train[:80]".
    Raises ConfigError for a missing or unreadable source, an unknown split, no rows.
    """
    _quiet_other_local_ranks()
    path = Path(name_or_path).expanduser()
    arguments: dict[str, Any] = {"split": split}
    if path.is_file():
        arguments |= {"path": _reader(path), "data_files": {"train": str(path)}}
    elif path.is_dir():
        if not any(child.suffix in READERS for child in path.rglob("*")):
            raise ConfigError(f"dataset folder {name_or_path!r} holds no {_suffixes()} file; put one there")
        arguments |= {"path": str(path), "name": config_name}
    elif _looks_like_path(name_or_path):
        raise ConfigError(f"dataset {name_or_path!r}: no such file or folder; check the path")
    else:
        arguments |= {"path": name_or_path, "name": config_name, "revision": revision}
    try:
        rows = datasets.load_dataset(**arguments)
    # ValueError: unknown split or config; OSError: not found, offline; RuntimeError: the hub
    # client; StopIteration: the JSON reader, of a file without a line in it.
    except (datasets.exceptions.DatasetsError, ValueError, OSError, RuntimeError, StopIteration) as error:
        raise ConfigError(
            f"dataset {name_or_path!r}, split {split!r}, cannot be read ({_reason(error)}); "
            f"check its name, split and format"
        ) from error
    if len(rows) == 0:
        raise ConfigError(f"dataset {name_or_path!r}, split {split!r}, has no rows; give one that has some")
    return rows


def _reader(path: Path) -> str:
    if path.suffix not in READERS:
        raise ConfigError(f"dataset file {str(path)!r} is none of {_suffixes()}; convert it to one of these")
    return READERS[path.suffix]


def _suffixes() -> str:
    return ", ".join(READERS)


def _looks_like_path(name: str) -> bool:
    """A hub name is "name" or "org/name"; everything else can only have meant a file."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in READERS


def _reason(error: Exception) -> str:
    """The first line of what went wrong; the generic wrapper of `datasets` hides it in its cause."""
    inner = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
    if isinstance(error, StopIteration):
        return "it is empty"
    lines = str(inner or error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _quiet_other_local_ranks() -> None:
    """One progress bar per node instead of one per process."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        datasets.disable_progress_bars()


# ---------------------------------------------------------------- tokenising


def tokenize_rows(
    rows: datasets.Dataset,
    tokenizer: Any,
    *,
    prompt_field: str,
    response_field: str,
    template: PromptTemplate,
    max_length: int,
    num_proc: int | None = None,
) -> TokenizedRows:
    """Turn two text columns into token ids and labels, in the order of `rows`.

    An example is prompt + response + newline + EOS, tokenised as one string and
    cut at max_length; labels are the same ids with the prompt's own length in
    tokens masked. The result is cached beside the rows' own cache under a key
    made of everything it depends on. Raises ConfigError for a missing column,
    an empty cell, a tokenizer without EOS, or if no row keeps a label.
    """
    _quiet_other_local_ranks()
    if tokenizer.eos_token is None:
        raise ConfigError("the tokenizer has no EOS token, which ends every answer; set tokenizer.eos_token")
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}; it must be at least 2, a prompt and an answer token")
    for field in (prompt_field, response_field):
        _check_column(rows, field)
    settings = {
        "prompt_field": prompt_field,
        "response_field": response_field,
        "template": template.text,
        "max_length": max_length,
    }
    fingerprint = _fingerprint(rows, tokenizer, settings)
    with _node_lock(rows, fingerprint) as cacheable:
        encoded = rows.map(
            _encode_batch,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            features=FEATURES,
            fn_kwargs=settings | {"tokenizer": tokenizer},
            new_fingerprint=fingerprint,
            num_proc=num_proc,
            keep_in_memory=not cacheable,
            desc="Tokenizing",
        )
    if len(encoded) == 0:
        raise ConfigError(f"max_length {max_length} leaves no answer token in any row; raise it")
    return TokenizedRows(
        dataset=encoded.remove_columns("truncated"),
        dropped_without_labels=len(rows) - len(encoded),
        truncated=sum(encoded["truncated"]),
    )


def _check_column(rows: datasets.Dataset, field: str) -> None:
    """Raises ConfigError naming the columns there are, the most similar first."""
    names = rows.column_names
    if field not in names:
        similar = difflib.get_close_matches(field, names, n=len(names), cutoff=0.0)
        raise ConfigError(
            f"column {field!r} is not in the dataset; its columns are {', '.join(similar)}; set --prompt_field and "
            f"--response_field to two of them"
        )
    if not isinstance(rows.features[field], datasets.Value):
        raise ConfigError(f"column {field!r} holds {rows.features[field]}; name a column of plain text")


def _encode_batch(
    batch: dict[str, list],
    indices: Sequence[int],
    *,
    tokenizer: Any,
    prompt_field: str,
    response_field: str,
    template: str,
    max_length: int,
) -> dict[str, list]:
    """Columns of FEATURES for those rows of the batch that keep at least one label."""
    prompts = [
        PromptTemplate(template).render(_text(value, prompt_field, index))
        for value, index in zip(batch[prompt_field], indices, strict=True)
    ]
    texts = [
        prompt + _text(value, response_field, index) + "\n" + tokenizer.eos_token
        for prompt, value, index in zip(prompts, batch[response_field], indices, strict=True)
    ]
    # Cut here, not by the tokenizer: `truncation_side` is "left" in some, which would
    # shift the prompt's mask, and others put back an EOS after cutting, which would
    # teach the model to stop in mid-answer. verbose=False: no warning about the length.
    all_ids = tokenizer(texts, verbose=False)["input_ids"]
    prompt_ids = tokenizer(prompts, verbose=False)["input_ids"]
    columns: dict[str, list] = {name: [] for name in FEATURES}
    for ids, own_prompt in zip(all_ids, prompt_ids, strict=True):
        kept = ids[:max_length]
        masked = min(len(own_prompt), len(kept))
        if masked == len(kept):
            continue
        columns["input_ids"].append(kept)
        columns["labels"].append([IGNORE] * masked + kept[masked:])
        columns["truncated"].append(len(ids) > max_length)
    return columns


def _text(value: Any, field: str, index: int) -> str:
    if value is None:
        raise ConfigError(f"row {index} (from 0) has nothing in column {field!r}; fill it or drop the row")
    return str(value)  # a CSV column of bare numbers arrives as numbers


# ---------------------------------------------------------------- cache


def _fingerprint(rows: datasets.Dataset, tokenizer: Any, settings: dict[str, Any]) -> str:
    """Cache key (32 hex digits) of everything the encoded rows depend on.

    Explicit because the automatic one pickles the tokenizer, whose state changes
    with use, so that processes would miss each other's cache.
    """
    parts = [FORMAT_VERSION, rows._fingerprint, _tokenizer_identity(tokenizer), settings]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _tokenizer_identity(tokenizer: Any) -> list[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        kind = type(tokenizer).__name__  # a slow tokenizer cannot be serialised: its name must do
        return [kind, str(tokenizer.name_or_path), str(len(tokenizer)), tokenizer.eos_token]
    state = json.loads(backend.to_str())
    for leftover_of_last_call in ("truncation", "padding"):
        state.pop(leftover_of_last_call, None)
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    return [digest, tokenizer.eos_token]


@contextlib.contextmanager
def _node_lock(rows: datasets.Dataset, fingerprint: str) -> Iterator[bool]:
    """Hold this node's lock on one cache entry; yields whether rows can be cached on disk.

    Rows made in memory have no cache folder, and a shared one may be read-only:
    then every process tokenises for itself, in memory.
    """
    folder = Path(rows.cache_files[0]["filename"]).parent if rows.cache_files else None
    if folder is None or not os.access(folder, os.W_OK):
        yield False
        return
    with FileLock(folder / f"tokenized-{fingerprint}.lock"):
        yield True
