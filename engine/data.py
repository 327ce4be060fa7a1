"""From rows of any format to token ids and labels: in parallel, cached, once per node.

Own file because it is all that happens to data between reading (data_sources.py) and an order. Which row goes to
which slice is engine/batches.py. It never talks to torch.distributed: every process calls it before the process
group exists, and a file lock lets the first process of a node do the work whose cached result the others read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from filelock import FileLock

from .data_encode import CUT, IGNORE, KEPT, LOSS_ON, TOO_LONG, UNLABELLED, Encoding, encode_batch
from .data_formats import Fields, RowFormat, recognise
from .data_sources import load_rows, quiet_other_local_ranks
from .errors import ConfigError
from .prompts import PromptTemplate

__all__ = ["IGNORE", "TokenizedRows", "encode_rows", "find_format", "join", "load_rows", "tokenize_rows"]

FORMAT_VERSION = 3  # part of the cache key: raise it whenever `encode_batch` changes its result
FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        "fate": datasets.Value("int8"),
        "length": datasets.Value("int32"),
    }
)


@dataclass(frozen=True)
class TokenizedRows:
    """`dataset` has `input_ids` and `labels` (lists of ints of equal length).

    `dropped_without_labels` rows left no answer token inside max_length, `dropped_too_long` were longer and
    truncation is "drop"; neither are in `dataset`. Of those that are, `truncated` lost their end.
    """

    dataset: datasets.Dataset
    dropped_without_labels: int
    truncated: int
    dropped_too_long: int = 0


def find_format(rows: Any, fields: Fields, wanted: str | None = None) -> RowFormat:
    """The format of a set's rows, by its columns and its first row. Raises ConfigError."""
    first = next(iter(rows), None)
    if first is None:
        raise ConfigError("the dataset has no rows; give one that has some")
    return recognise(first, fields, wanted)


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
    """`encode_rows` for two text columns: prompt + response + newline + EOS, the prompt masked."""
    format = find_format(rows, Fields(prompt_field, response_field, given=True))
    encoding = Encoding(format, template.text, None, "completion", max_length)
    return encode_rows(rows, tokenizer, encoding, num_proc=num_proc)


def encode_rows(
    rows: datasets.Dataset, tokenizer: Any, encoding: Encoding, *, num_proc: int | None = None
) -> TokenizedRows:
    """Turn rows into token ids and labels, in the order of `rows`.

    The result is cached in the cache of `datasets`, beside the rows' own where they have one, under a key made of
    everything it depends on. Raises ConfigError for an empty cell, a tokenizer without EOS, a row that is too long
    where truncation is "error", or if no row keeps a label.
    """
    quiet_other_local_ranks()
    check_encoding(tokenizer, encoding)
    fingerprint = _fingerprint(rows, tokenizer, encoding)
    with _node_lock(rows, fingerprint) as cache:
        encoded = rows.map(
            encode_batch,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            features=FEATURES,
            fn_kwargs={"tokenizer": tokenizer, "encoding": encoding},
            new_fingerprint=fingerprint,
            num_proc=num_proc,
            keep_in_memory=cache is None,
            cache_file_name=cache,
            desc="Tokenizing",
        )
    return _kept(encoded, encoding)


def check_encoding(tokenizer: Any, encoding: Encoding) -> None:
    """Raises ConfigError for what no row could be encoded with."""
    if tokenizer.eos_token is None:
        raise ConfigError("the tokenizer has no EOS token, which ends every answer; set tokenizer.eos_token")
    if encoding.max_length < 2:
        raise ConfigError(f"max_length is {encoding.max_length}; it must be at least 2, a prompt and an answer token")
    if encoding.format.chat and not encoding.chat_template:
        raise ConfigError(
            f"rows of {encoding.format} need a chat template and the tokenizer has none; give a Jinja file or text by "
            f"--chat_template"
        )


def _kept(encoded: datasets.Dataset, encoding: Encoding) -> TokenizedRows:
    """The rows that have something to learn, and how many have not."""
    fates, lengths = (np.asarray(encoded.data.column(name)) for name in ("fate", "length"))
    counts = np.bincount(fates, minlength=4)
    if encoding.truncation == "error" and counts[TOO_LONG]:
        first = int(np.flatnonzero(fates == TOO_LONG)[0])
        raise ConfigError(
            f"{counts[TOO_LONG]} of {len(fates)} rows have more than --max_length {encoding.max_length} tokens (the "
            f"first is row {first}, counted from 0, with {lengths[first]}); raise it, or let --truncation be truncate "
            f"or drop"
        )
    kept = np.flatnonzero((fates == KEPT) | (fates == CUT))
    if len(kept) == 0:
        if not (lengths > encoding.max_length).any():
            raise ConfigError(f"no row has anything to learn, with loss on {LOSS_ON[encoding.learn]}; add some")
        what = "no answer token in any row" if counts[UNLABELLED] else "no row"
        raise ConfigError(f"max_length {encoding.max_length} leaves {what}; raise it")
    dataset = encoded.select_columns(["input_ids", "labels"])
    if len(kept) < len(fates):
        dataset = dataset.select(kept, keep_in_memory=True)
    return TokenizedRows(dataset, int(counts[UNLABELLED]), int(counts[CUT]), int(counts[TOO_LONG]))


def join(parts: Sequence[TokenizedRows]) -> TokenizedRows:
    """Several sets as one, in order."""
    if len(parts) == 1:
        return parts[0]
    return TokenizedRows(
        datasets.concatenate_datasets([part.dataset for part in parts]),
        sum(part.dropped_without_labels for part in parts),
        sum(part.truncated for part in parts),
        sum(part.dropped_too_long for part in parts),
    )


# ---------------------------------------------------------------- cache


def _fingerprint(rows: datasets.Dataset, tokenizer: Any, encoding: Encoding) -> str:
    """Cache key (32 hex digits) of everything the encoded rows depend on.

    Explicit because the automatic one pickles the tokenizer, whose state changes
    with use, so that processes would miss each other's cache.
    """
    parts = [FORMAT_VERSION, rows._fingerprint, _tokenizer_identity(tokenizer), encoding.key()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _tokenizer_identity(tokenizer: Any) -> list[str]:
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)  # chat templates write them
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        kind = type(tokenizer).__name__  # a slow tokenizer cannot be serialised: its name must do
        return [kind, str(tokenizer.name_or_path), str(len(tokenizer)), special]
    state = json.loads(backend.to_str())
    for leftover_of_last_call in ("truncation", "padding"):
        state.pop(leftover_of_last_call, None)
    return [hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest(), special]


@contextlib.contextmanager
def _node_lock(rows: datasets.Dataset, fingerprint: str) -> Iterator[str | None]:
    """Hold this node's lock on one cache entry; yields its file, None where rows cannot be cached on disk.

    Rows made in memory have no files, and a shared cache may be read-only:
    then every process tokenises for itself, in memory.
    """
    file = _cache_file(rows, fingerprint) if rows.cache_files else None
    if file is None or not os.access(file.parent, os.W_OK):
        yield None
        return
    with FileLock(file.parent / f"tokenized-{fingerprint}.lock"):
        yield str(file)


def _cache_file(rows: datasets.Dataset, fingerprint: str) -> Path | None:
    """In the cache of `datasets`: a folder that `save_to_disk` wrote is the user's, and nothing is put into it."""
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    files = [Path(file["filename"]) for file in rows.cache_files]
    if files[0].resolve().is_relative_to(cache.resolve()):
        return files[0].parent / f"cache-{fingerprint}.arrow"
    # There files are named by what they were made of; a user's are not, and can have been written anew.
    stamps = [(str(file.resolve()), (found := file.stat()).st_size, found.st_mtime_ns) for file in files]
    name = hashlib.sha256(json.dumps([fingerprint, stamps]).encode()).hexdigest()[:32]
    with contextlib.suppress(OSError):
        (cache / "saved").mkdir(parents=True, exist_ok=True)
        return cache / "saved" / f"cache-{name}.arrow"
    return None
