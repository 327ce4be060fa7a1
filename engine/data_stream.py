"""Training batches from a stream: rows are read when their step comes, and nothing is kept.

Own file because a stream has no length, no rows by number and no way back. The order is a function of (seed, step,
slice, micro-batch) all the same, and bit for bit the same at every number of processes: every process reads and
tokenises the whole stream and leaves away what other slices get. Going on with a run reads the stream again from its
beginning and leaves away what the steps so far have had.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import torch

from .batches import Batches
from .checksum import add, checksum
from .data import FEATURES
from .data_encode import CUT, KEPT, TOO_LONG, Encoding, encode_batch
from .data_packing import Row, pack
from .errors import ConfigError, StopError

ENCODED_AT_ONCE = 64  # rows; more would only wait longer for the first
PACKED_AT_ONCE = 1000  # rows that --packing chooses from


def encode_stream(
    rows: Any, tokenizer: Any, encoding: Encoding, *, columns: list[str], seed: int, buffer_size: int
) -> Any:
    """A stream of encoded rows: shuffled in a buffer of `buffer_size` rows, then encoded a few at a time."""
    return rows.shuffle(seed=seed, buffer_size=buffer_size).map(
        encode_batch,
        batched=True,
        batch_size=ENCODED_AT_ONCE,
        with_indices=True,
        remove_columns=columns,
        features=FEATURES,
        fn_kwargs={"tokenizer": tokenizer, "encoding": encoding},
    )


class StreamBatches(Batches):
    """`SliceBatches` for a stream of encoded rows.

    The stream's samples take the place of the shuffled dataset's: a step gets the next S · M · micro of them. At its
    end it begins anew, in the same order; what fills no whole step is left out. Every process calls `units` for
    steps that do not go down; a smaller step reads from the beginning.

    Args:
        steps: of the run; an epoch is taken to have as many, as in Hugging Face's Trainer.
        capacity: with packing, tokens of a bin; None without. Bins are filled from 1000 rows at a time.
        max_length_is_law: whether a row that is too long ends the run.

    Attributes:
        counts: rows read so far by what became of them: kept, truncated, without labels, too long.
        passes: how often the stream has been read to its end.
    """

    def __init__(
        self,
        stream: Any,
        *,
        sizes: dict[str, int],
        steps: int,
        seed: int,
        capacity: int | None = None,
        flat: bool = False,
        max_length_is_law: bool = False,
    ) -> None:
        super().__init__(**sizes, packed=capacity is not None, flat=flat)
        self.steps_per_epoch = steps
        self._stream, self._seed, self._capacity, self._law = stream, seed, capacity, max_length_is_law
        self._begin_anew()
        self._first = self._checksum(self._go_to(0))

    def _begin_anew(self) -> None:
        self.counts, self.passes = [0, 0, 0, 0], 0
        self._at, self._now = -1, list[list[Row]]()
        self._samples, self._of_this_pass = self._read(), 0

    def units(self, step: int, slice_id: int, micro_batch: int) -> list[list[Row]]:
        self._refuse_missing(step, slice_id, micro_batch)
        now = self._go_to(step)
        first = micro_batch * self.micro_batch_size
        return [now[slice_id + self.slices * row] for row in range(first, first + self.micro_batch_size)]

    def identity(self) -> dict[str, Any]:
        return {"rows": "a stream", "tokens": self._first, "order": "packed" if self.packed else "as they come"}

    def read_so_far(self) -> dict[str, int]:
        """Rows from the beginning of the stream, all passes together, under the names of run.json."""
        kept, cut, unlabelled, too_long = self.counts
        return {
            "read": sum(self.counts),
            "passes": self.passes,
            "kept": kept + cut,
            "dropped_without_labels": unlabelled,
            "dropped_too_long": too_long,
            "truncated": cut,
        }

    def head(self) -> Iterator[list[Row]]:
        """The samples from the beginning, for people to look at."""
        return self._read()

    # --- reading -------------------------------------------------------------------------------------

    def _go_to(self, step: int) -> list[list[Row]]:
        """The samples of a step."""
        if step < self._at:
            self._begin_anew()
        while self._at < step:
            self._now = self._next_step()
            self._at += 1
        return self._now

    def _next_step(self) -> list[list[Row]]:
        found: list[list[Row]] = []
        while len(found) < self.global_batch:
            sample = self._next_sample()
            if sample is not None:
                found.append(sample)
                self._of_this_pass += 1
                continue
            if self._of_this_pass < self.global_batch:
                raise self._too_few(self._of_this_pass)
            self._samples, self._of_this_pass, found = self._read(), 0, []
            self.passes += 1
        return found

    def _next_sample(self) -> list[Row] | None:
        try:
            return next(self._samples, None)
        except ConfigError as error:
            if self._at < 0:
                raise
            raise StopError(f"after step {self._at + 1}, in the stream of training rows: {error}") from None

    def _read(self) -> Iterator[list[Row]]:
        """One pass over the stream, sample by sample."""
        if self._capacity is None:
            return ([row] for row in self._rows())
        return self._bins(self._capacity)

    def _rows(self) -> Iterator[Row]:
        for number, row in enumerate(self._stream):
            self.counts[row["fate"]] += 1
            if row["fate"] == TOO_LONG and self._law:
                raise ConfigError(
                    f"row {number} of the stream (from 0) has {row['length']} tokens, more than --max_length; raise "
                    f"it, or let --truncation be truncate or drop"
                )
            if row["fate"] in (KEPT, CUT):
                yield {"input_ids": row["input_ids"], "labels": row["labels"]}

    def _bins(self, capacity: int) -> Iterator[list[Row]]:
        generator, waiting = np.random.default_rng(self._seed), list[Row]()

        def packed() -> Iterator[list[Row]]:
            bins = pack([len(row["input_ids"]) for row in waiting], capacity)
            return iter([[waiting[at] for at in bins[number]] for number in generator.permutation(len(bins))])

        for row in self._rows():
            waiting.append(row)
            if len(waiting) == PACKED_AT_ONCE:
                yield from packed()
                waiting.clear()
        yield from packed()

    def _checksum(self, samples: list[list[Row]]) -> str:
        total, start = 0, 0
        for row in (row for sample in samples for row in sample):
            for ids in (row["input_ids"], row["labels"]):
                total, start = add(total, checksum(torch.tensor(ids, dtype=torch.int32), start)), start + len(ids)
        return f"{start // 2} in the first step with checksum {total:016x}"


def is_stream(rows: Any) -> bool:
    """Whether rows come one by one."""
    return isinstance(rows, datasets.IterableDataset)
