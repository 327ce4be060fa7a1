"""Which sample goes to which slice, and how samples become tensors.

Own file because this order is part of the method: it is a function of (seed,
step, slice, micro-batch) and of nothing else. No class here but EvalBatches
knows a rank or a world size; engine/slicing.py says which rank asks for which
slice's micro-batch. A sample is a row, or with packing a bin of rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch

from . import pulse
from .checksum import add, checksum
from .data_encode import IGNORE
from .data_packing import PackedRows, Row, collate_packed, lengths_of, rows_of
from .errors import ConfigError

SHUFFLED = "shuffled"  # the order without options, which checkpoints that name none have
GROUPED = 50  # micro-batches of a slice within which --group_by_length sorts, as Hugging Face's sampler does


def collate(rows: Sequence[Mapping[str, Sequence[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right to the longest: three int64 tensors of shape (rows, longest).

    attention_mask is 1 over a row's real length, also where the pad token is a
    real token of the row (pad is often EOS); labels are padded with -100.
    """
    width = max(len(row["input_ids"]) for row in rows)
    batch = {
        "input_ids": torch.full((len(rows), width), pad_token_id, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), width, dtype=torch.long),
        "labels": torch.full((len(rows), width), IGNORE, dtype=torch.long),
    }
    for position, row in enumerate(rows):
        length = len(row["input_ids"])
        batch["input_ids"][position, :length] = torch.as_tensor(row["input_ids"])
        batch["attention_mask"][position, :length] = 1
        batch["labels"][position, :length] = torch.as_tensor(row["labels"])
    return batch


def count_target_tokens(labels: torch.Tensor) -> int:
    """How many tokens of (rows, length) labels are predicted: a causal model never predicts the first."""
    return int((labels[:, 1:] != IGNORE).sum())


class Batches(ABC):
    """What training batches by (step, slice, micro-batch) have in common, whatever they are read from.

    Attributes:
        steps_per_epoch: optimizer steps after which the data begin anew.
        dropped_samples: samples of an epoch that fill no whole step.
    """

    steps_per_epoch: int
    dropped_samples: int = 0

    def __init__(
        self,
        *,
        slices: int,
        micro_batches_per_slice: int,
        micro_batch_size: int,
        pad_token_id: int,
        packed: bool,
        flat: bool,
    ) -> None:
        sizes = {
            "slices": slices,
            "micro_batches_per_slice": micro_batches_per_slice,
            "micro_batch_size": micro_batch_size,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        self.slices = slices
        self.micro_batches_per_slice = micro_batches_per_slice
        self.micro_batch_size = micro_batch_size
        self.pad_token_id = pad_token_id
        self.packed, self.flat = packed, flat
        self._counted: tuple[tuple[int, int], list[int]] = ((-1, -1), [])

    @property
    def global_batch(self) -> int:
        """Samples of an optimizer step."""
        return self.slices * self.micro_batches_per_slice * self.micro_batch_size

    @abstractmethod
    def units(self, step: int, slice_id: int, micro_batch: int) -> list[list[Row]]:
        """The rows of a micro-batch, sample by sample; `step` counts from the start of the run."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the content and the order of the data depend on, beside the sizes and the seed."""

    def batch(self, step: int, slice_id: int, micro_batch: int) -> dict[str, torch.Tensor]:
        """The tensors of one micro-batch: those of `collate`, or with packing of `collate_packed`."""
        pulse.reach("step.data")
        units = self.units(step, slice_id, micro_batch)
        if self.packed:
            return collate_packed(units, self.pad_token_id, flat=self.flat)
        return collate([row for unit in units for row in unit], self.pad_token_id)

    def loss_weight(self, step: int, slice_id: int, micro_batch: int) -> float:
        """What a micro-batch's mean loss is multiplied with so that all target tokens of its slice's step weigh alike.

        The slice takes the mean over its M micro-batches, so a micro-batch with n of the slice's N target tokens is
        worth M·n / N. The sum of these weights is M. It needs no communication where several ranks share a slice:
        each can look at all of its micro-batches.
        """
        if self._counted[0] != (step, slice_id):
            every = range(self.micro_batches_per_slice)
            self._counted = (step, slice_id), [self._targets(step, slice_id, other) for other in every]
        counts = self._counted[1]
        return len(counts) * counts[micro_batch] / sum(counts)

    def _targets(self, step: int, slice_id: int, micro_batch: int) -> int:
        labels = (row["labels"][1:] for unit in self.units(step, slice_id, micro_batch) for row in unit)
        return sum(int(np.count_nonzero(np.asarray(own) != IGNORE)) for own in labels)

    def _refuse_missing(self, step: int, slice_id: int, micro_batch: int) -> None:
        exists = 0 <= slice_id < self.slices and 0 <= micro_batch < self.micro_batches_per_slice
        if step < 0 or not exists:
            raise IndexError(f"no micro-batch {micro_batch} of slice {slice_id} in step {step}")

    def _too_few(self, samples: int) -> ConfigError:
        noun = "packed rows" if self.packed else "samples"
        return ConfigError(
            f"the global batch is {self.global_batch} {noun} but the dataset has only {samples}; "
            f"lower the accumulation steps or the micro-batch size, or add samples"
        )


class SliceBatches(Batches):
    """Training batches by (step, slice, micro-batch); the same at every world size.

    The dataset is shuffled once, by `dataset.shuffle(seed=seed)`, and **every
    epoch runs through that same order**, as in the reference. With S slices,
    slice i's stream is samples i, i+S, i+2S, … of the shuffled dataset. Its
    micro-batch j in step t of an epoch is rows [(t·M + j)·micro, +micro) of its
    stream, M being `micro_batches_per_slice` of one optimizer step. What does
    not fill a whole step at the end of an epoch is left out (`dropped_samples`).

    Example: 8 samples, S = 2, M = 2, micro = 1 gives 2 steps an epoch; in step 1
    slice 0 gets shuffled samples 4 and 6, slice 1 gets 5 and 7.

    With `group_by_length` the shuffled order is changed within stretches of about
    50 micro-batches per slice: sorted by length, so that what all slices compute
    at the same time has about the same length, and these columns of S · micro
    samples shuffled again, so that no step has only long ones.

    Raises ConfigError if a size is below 1 or an epoch has not one whole step.
    """

    def __init__(
        self,
        dataset: datasets.Dataset | PackedRows,
        *,
        slices: int,
        micro_batches_per_slice: int,
        micro_batch_size: int,
        seed: int,
        pad_token_id: int,
        group_by_length: bool = False,
        flat: bool = False,
    ) -> None:
        super().__init__(
            slices=slices,
            micro_batches_per_slice=micro_batches_per_slice,
            micro_batch_size=micro_batch_size,
            pad_token_id=pad_token_id,
            packed=isinstance(dataset, PackedRows),
            flat=flat,
        )
        self.steps_per_epoch = len(dataset) // self.global_batch
        self.dropped_samples = len(dataset) - self.steps_per_epoch * self.global_batch
        if self.steps_per_epoch == 0:
            raise self._too_few(len(dataset))
        self._source = dataset
        self.dataset = dataset.shuffle(seed=seed)
        self._order = self._grouped(seed) if group_by_length else None

    def sample_indices(self, step: int, slice_id: int, micro_batch: int) -> list[int]:
        """Positions in the shuffled dataset; `step` counts from the start of the run.

        Raises IndexError for a slice or micro-batch that does not exist.
        """
        self._refuse_missing(step, slice_id, micro_batch)
        step_in_epoch = step % self.steps_per_epoch
        first = (step_in_epoch * self.micro_batches_per_slice + micro_batch) * self.micro_batch_size
        places = [slice_id + self.slices * row for row in range(first, first + self.micro_batch_size)]
        return places if self._order is None else [int(self._order[place]) for place in places]

    def units(self, step: int, slice_id: int, micro_batch: int) -> list[list[Row]]:
        indices = self.sample_indices(step, slice_id, micro_batch)
        if isinstance(self.dataset, PackedRows):
            return self.dataset.units(indices)
        return [[row] for row in rows_of(self.dataset, indices)]

    def identity(self) -> dict[str, Any]:
        rows = self._source.dataset if isinstance(self._source, PackedRows) else self._source
        order = SHUFFLED
        if isinstance(self._source, PackedRows):
            order = f"packed into {len(self._source)} of {self._source.capacity} tokens"
        order = order if self._order is None else "grouped by length"
        return {"rows": len(rows), "tokens": _tokens_identity(rows), "order": order}

    def _grouped(self, seed: int) -> np.ndarray:
        """place in the order of training → position in the shuffled dataset."""
        assert isinstance(self.dataset, datasets.Dataset)
        lengths, generator = lengths_of(self.dataset), np.random.default_rng(seed)
        column = self.slices * self.micro_batch_size  # what all slices compute at the same time
        stretch = -(-GROUPED // self.micro_batches_per_slice) * self.global_batch
        order = np.arange(self.steps_per_epoch * self.global_batch)
        for start in range(0, len(order), stretch):
            here = order[start : start + stretch]
            columns = here[np.argsort(-lengths[here], kind="stable")].reshape(-1, column)
            order[start : start + stretch] = columns[generator.permutation(len(columns))].reshape(-1)
        return order


class EvalBatches:
    """Every row once, dealt round-robin to the ranks, with equally many batches on each.

    Under ZeRO-3 each forward is a collective, so a rank that has run out of rows
    must still take part. It gets a batch of one repeated row, marked not real:
    its labels are that row's own, so that the mean loss is finite, and the
    caller multiplies by zero. A rank's last real batch may be smaller.

    Iterating yields (batch, real); `len()` is the number of batches. Raises
    ConfigError for an empty dataset or a batch size below 1.
    """

    def __init__(
        self, dataset: datasets.Dataset, *, rank: int, world_size: int, batch_size: int, pad_token_id: int
    ) -> None:
        if len(dataset) == 0:
            raise ConfigError("the evaluation dataset has no rows; give one with rows, or do not evaluate")
        if batch_size < 1:
            raise ConfigError(f"the evaluation batch size is {batch_size}; it must be at least 1")
        self.dataset = dataset
        self.batch_size = batch_size
        self.pad_token_id = pad_token_id
        self.rows = range(rank, len(dataset), world_size)
        longest_share = -(-len(dataset) // world_size)
        self.batches = -(-longest_share // batch_size)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], bool]]:
        for number in range(self.batches):
            mine = list(self.rows[number * self.batch_size : (number + 1) * self.batch_size])
            yield collate(rows_of(self.dataset, mine or [0]), self.pad_token_id), bool(mine)


def _tokens_identity(dataset: datasets.Dataset) -> str:
    """The checksum of all input ids and labels, row by row."""
    total, start = 0, 0
    for batch in dataset.with_format("arrow").iter(batch_size=10_000):
        for column in ("input_ids", "labels"):
            ids = torch.tensor(batch.column(column).combine_chunks().flatten().to_numpy())
            total, start = add(total, checksum(ids, start)), start + ids.numel()
    return f"{start // 2} with checksum {total:016x}"
